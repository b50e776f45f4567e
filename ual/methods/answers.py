"""The normal form in which answers are compared."""

import math
import re
import unicodedata
from decimal import Context, Decimal

_NUMBER = re.compile(r"([+-]?)[$€£]?(\d{1,3}(?:,\d{3})+|\d*)(\.\d*)?(e[+-]?\d{1,3})?")
_TWELVE_DIGITS = Context(prec=12)


def normalize(value: str | float | None) -> str | None:
    """Return a string that equal answers share, or None if there is nothing to compare.

    Thousands separators, a currency sign and trailing zeros of numbers are removed. Fractions are rounded to
    12 significant digits, so that 3.9999999999999996 is 4. Case, repeated white space and a final period of
    texts are removed.

    >>> normalize(18.0), normalize("$1,800.00"), normalize(" New  York. "), normalize(float("nan"))
    ('18', '1800', 'new york', None)
    """
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    text = " ".join(unicodedata.normalize("NFKC", str(value)).casefold().split())
    number = _NUMBER.fullmatch(text)
    if number is None or not (number[2] or (number[3] or "").strip(".")):
        return text.rstrip(". ") or None
    sign, whole, fraction, exponent = (part or "" for part in number.groups())
    decimal = Decimal(sign + whole.replace(",", "") + fraction + exponent)
    if decimal != decimal.to_integral_value():
        decimal = _TWELVE_DIGITS.plus(decimal)
    digits = f"{abs(decimal) if decimal.is_zero() else decimal:f}"
    return digits.rstrip("0").rstrip(".") if "." in digits else digits
