"""A hash of int64 tensors that is the same on every device, in every process and run."""

from torch import Tensor

GOLDEN = -0x61C8864680B583EB  # 2^64 over the golden ratio, as a signed number


def splitmix64(values: Tensor) -> Tensor:
    """Finalizer of SplitMix64, a bijection of 64-bit integers, here with signed ones.

    Args:
        values: int64, any shape.

    Returns:
        int64, of the same shape.

    Source:
        Steele, Lea & Flood, OOPSLA 2014.
    """
    values = (values ^ _shifted(values, 30)) * -0x40A7B892E31B1A47
    values = (values ^ _shifted(values, 27)) * -0x6B2FB644ECCEEE15
    return values ^ _shifted(values, 31)


def _shifted(values: Tensor, bits: int) -> Tensor:
    """Right shift that fills with zeros; torch's own shift of int64 repeats the sign."""
    return (values >> bits) & (2 ** (64 - bits) - 1)
