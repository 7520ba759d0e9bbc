"""The channels of the weight sync, one module each: broadcast, shared memory, disk; `base` is their interface."""
