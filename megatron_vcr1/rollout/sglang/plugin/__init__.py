"""The plug-in that SGLang servers load: SGLANG_EXTERNAL_MM_PROCESSOR_PACKAGE=megatron_vcr1.rollout.sglang.plugin.

Importing this package checks SGLang's version. The check must run here and not in one of the package's modules: SGLang
imports the package first, and an error ends the server, as it should. An error in a module is only logged, and the
server would then process videos in SGLang's own way.
"""

from megatron_vcr1.rollout.sglang.plugin.processor import check_sglang

check_sglang()
