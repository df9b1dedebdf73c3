"""Parse options of the command line: numbers, units, steps and sizes."""

from __future__ import annotations

from grutrace.errors import OptionError
from grutrace.options import parse_bytes


def parse_units(text: str) -> slice | tuple[int, ...]:
    """Parse units such as 0,3,7 or 0:32 into the values that a tracer takes.

    Raises:
        OptionError: The text has another form.
    """
    return parse_numbers("units", text)


def parse_numbers(option: str, text: str) -> slice | tuple[int, ...]:
    """Parse numbers such as 0,3,7 or a range such as 0:32.

    Args:
        option: Name of the option that they are given for.
        text: The numbers.

    Raises:
        OptionError: The text has another form.
    """
    expected = "numbers separated by commas, or a range such as 0:32"
    if ":" in text:
        return _range(option, text, expected)
    return tuple(_number(option, number, text, expected) for number in text.split(","))


def parse_steps(text: str) -> slice:
    """Parse steps such as 5:20 into a slice.

    Raises:
        OptionError: The text has another form, or the range is empty.
    """
    expected = "a range such as 5:20, from 0 on"
    steps = _range("steps", text, expected) if text.count(":") == 1 else None
    start = 0 if steps is None or steps.start is None else steps.start
    if steps is None or start < 0 or (steps.stop is not None and steps.stop <= start):
        raise OptionError(f"steps: expected {expected}, found {text!r}")
    return steps


def _range(option: str, text: str, expected: str) -> slice:
    numbers = text.split(":")
    if len(numbers) > 3:
        raise OptionError(f"{option}: expected {expected}, found {text!r}")
    return slice(
        *(_number(option, number, text, expected) if number else None for number in numbers)
    )


def _number(option: str, number: str, text: str, expected: str) -> int:
    """Parse one number of an option. `text` is the whole value, for the message."""
    try:
        return int(number)
    except ValueError:
        raise OptionError(f"{option}: expected {expected}, found {text!r}") from None


def parse_size(text: str, option: str = "max_bytes") -> int:
    """Parse a size such as 500000, 10GB or 1.5GiB into bytes.

    Args:
        text: The size.
        option: Name of the option that it is given for.

    Raises:
        OptionError: The text has another form.
    """
    size = parse_bytes(text)
    if size is None:
        raise OptionError(f"{option}: expected a size such as 10GB or 512MiB, found {text!r}")
    return size
