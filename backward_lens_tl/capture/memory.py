"""Limits on the memory of a call, and the form in which factors are kept."""

from __future__ import annotations

from dataclasses import dataclass
from operator import index
from typing import TYPE_CHECKING

from backward_lens_tl._checks import check_choice, is_integer, shown
from backward_lens_tl.errors import InputError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Memory:
    """Limits on the memory of one call.

    Tokens, scores, target ranks and losses do not depend on it: they are computed before factors
    are rounded or moved. Norms, cosines and ranks of gradients are those of the kept factors.

    Attributes:
        budget: Bytes that the call may use in addition to the model, estimated from the model's
            sizes. Prompts, and for a single prompt that is too large its layers, are divided into
            microbatches, and scores over the vocabulary into chunks. `None` sets no limit.
        factor_dtype: The dtype of the kept `x_i` and `delta_i`, such as `torch.bfloat16` for half
            the memory; `None` is float32, or float64 for a model in float64.
        factor_device: The device of the kept factors, such as `"cpu"` for a model on a GPU; `None`
            is the model's own.

    Raises:
        InputError: If a value is invalid.

    Examples:
        >>> import backward_lens_tl as blt
        >>> blt.Memory(budget=2 * 2**30).budget
        2147483648
    """

    budget: int | None = None
    factor_dtype: torch.dtype | None = None
    factor_device: torch.device | str | None = None

    def __post_init__(self) -> None:
        if self.budget is not None:
            if not is_integer(self.budget) or index(self.budget) <= 0:
                raise InputError(
                    f"budget is {shown(self.budget)}; pass a number of bytes, such as 2 * 2**30, "
                    "or None for no limit"
                )
            # numpy's integers overflow, and this is multiplied.
            object.__setattr__(self, "budget", index(self.budget))
        import torch  # here, so that the command's help does not import it

        dtypes = (None, torch.bfloat16, torch.float32, torch.float64)
        check_choice("factor_dtype", self.factor_dtype, dtypes)
        try:
            device = None if self.factor_device is None else torch.device(self.factor_device)
            torch.empty(0, device=device)
        # The error that torch raises depends on the device and on torch's build.
        except (RuntimeError, TypeError, AssertionError, ImportError) as error:
            raise InputError(
                f"factor_device is {shown(self.factor_device)}, which is not a device of this "
                "machine; pass for example 'cpu', or None for the model's own"
            ) from error
        if device is not None and device.type == "meta":
            raise InputError("factor_device is 'meta', which keeps no values; pass 'cpu'")

    @property
    def keeps_as_computed(self) -> bool:
        """Whether factors stay in the form in which they are computed."""
        return self.factor_dtype is None and self.factor_device is None

    @property
    def chunk(self) -> int | None:
        """Bytes for the scores of one chunk of vectors, an eighth of the budget."""
        return None if self.budget is None else self.budget // 8

    def device_for(self, model_device: torch.device) -> torch.device:
        """The device of the kept factors.

        Args:
            model_device: The model's device.

        Returns:
            The device.

        Examples:
            >>> blt.Memory(factor_device="cpu").device_for(torch.device("cuda"))
            device(type='cpu')
        """
        import torch

        if self.factor_device is None:
            return model_device
        return torch.empty(0, device=self.factor_device).device  # "cuda" by its number


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether an error reports a lack of memory.

    Args:
        error: The error.

    Returns:
        Whether it does.
    """
    import torch

    # On a CPU torch raises a plain RuntimeError.
    lacks = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return lacks or "allocate memory" in str(error)
