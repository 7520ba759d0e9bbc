"""What an SGLang server loads: SGLANG_EXTERNAL_MM_PROCESSOR_PACKAGE=megatron_vcr1.rollout.sglang.plugin.

Importing it checks SGLang's version. SGLang lets an error here end the server, as it must; an error in one of the
package's modules it would only log, and serve videos its own way.
"""

from megatron_vcr1.rollout.sglang.plugin.processor import check_sglang

check_sglang()
