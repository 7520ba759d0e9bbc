"""Process groups, the CPU backend, and the glue to megatron-core's pipeline schedules.

Importing this package prepares torch and megatron-core for a machine without CUDA, and changes nothing where it exists.
"""

from megatron_vcr1.parallel import cpu_backend

cpu_backend.install()
