"""peft, without two lines that libraries print over it and that no user of ours can act upon.

Importing it loads bitsandbytes, which misses an optional kernel for inference in four bits on a CPU (quantized.py keeps training
off that path); and to wrap a model it asks transformers by a name that transformers has replaced.
"""

import logging
import warnings

logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: not record.getMessage().startswith("Failed to load CPU gemm_4bit_forward from kernels-community")
)
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)

from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: E402

__all__ = ["BaseTunerLayer", "LoraConfig", "PeftModel", "get_peft_model"]
