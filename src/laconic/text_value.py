"""TextValue: what a recipe writes as one text, such as a scope or a budget."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic_core import core_schema

from laconic.errors import LaconicError

__all__ = ["TextValue"]


class TextValue:
    """A value that is its text: equal where the text is, and written as it in recipes.

    Args:
        text: tidied by the subclass, so that equal values have one text.

    Attributes:
        example: what a text looks like, for messages: "a scope is a text such as ...".
        described: for editors, in the schema of recipes.

    >>> class Colour(TextValue):
    ...     example, described = "light red", "a colour"
    >>> Colour("red"), Colour("red") == Colour("red")
    (Colour('red'), True)
    """

    example: ClassVar[str]
    described: ClassVar[str]

    def __init__(self, text: str) -> None:
        self._text = text

    @property
    def text(self) -> str:
        """Return what it is written as."""
        return self._text

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.text!r})"

    def __str__(self) -> str:
        return self.text

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and str(other) == self.text

    def __hash__(self) -> int:
        return hash(self.text)

    @classmethod
    def _validate(cls, value: Any) -> TextValue:
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            try:
                return cls(value)
            except LaconicError as error:
                raise ValueError(str(error)) from None
        raise ValueError(
            f"a {cls.__name__.lower()} is a text such as {cls.example!r}, got {value!r}"
        )

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls._validate, serialization=core_schema.to_string_ser_schema()
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: Any, handler: Any) -> dict[str, str]:
        return {"type": "string", "description": cls.described}
