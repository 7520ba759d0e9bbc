"""Process groups, the CPU backend, and the glue to megatron-core's pipeline schedules.

Importing this package prepares torch and megatron-core for a machine without CUDA; where CUDA exists it changes
nothing.
"""

from megatron_vcr1.parallel import cpu_backend

cpu_backend.install()
