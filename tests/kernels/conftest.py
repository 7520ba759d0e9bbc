"""Every op is tested on two paths: PyTorch on the CPU, and the Triton kernels.

The Triton kernels run on a GPU if there is one, otherwise in Triton's interpreter.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# Must be set before anything imports triton: triton reads it when it decorates a kernel.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from vcr1_kernels.backend import interpreter


@pytest.fixture(params=["pytorch", "triton"])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Run the test once per path, and return the device on which it must create its tensors."""
    if request.param == "pytorch":
        yield torch.device("cpu")
    elif torch.cuda.is_available():
        yield torch.device("cuda")
    else:
        with interpreter():
            yield torch.device("cpu")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def skip_bfloat16_matmul_in_interpreter(request: pytest.FixtureRequest) -> None:
    """Skip bfloat16 without a GPU: Triton 3.6's interpreter multiplies the bit patterns of bfloat16 matrices.

    float16 tests the same code.
    """
    path, dtype = request.node.callspec.params["device"], request.node.callspec.params["dtype"]
    if path == "triton" and dtype == torch.bfloat16 and not torch.cuda.is_available():
        pytest.skip("bfloat16 tl.dot needs a GPU")
