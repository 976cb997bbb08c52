"""A folder is a registry: one file is one plug-in, and the file's name is its name in YAML.

Listing imports nothing. A plug-in is a frozen pydantic model, so its fields are its YAML keys, with types and ranges.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Annotated, Any, ClassVar, Generic, Self, TypeVar, Union, get_args

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetJsonSchemaHandler,
    ModelWrapValidatorHandler,
    SerializerFunctionWrapHandler,
    Tag,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, ErrorDetails, InitErrorDetails, PydanticCustomError
from pydantic_core.core_schema import ErrorType

from fedmerge.errors import Problem, ScenarioError, nearest

FORMER = {"initialisation": "initialization", "optimiser": "optimizer", "defences": "defenses"}
"""Older spellings of YAML keys, and the keys that they are now."""

EXAMPLES = "\n\nExamples\n--------\n"
"""What stands between the words of a docstring and its examples."""

Label = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.+-]{0,63}$")]
"""A row's name that somebody has chosen: without ':', which parts the names of rows that a method makes for each site."""


class Spec(BaseModel):
    """What a YAML mapping may say: unknown keys are errors, and values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, ser_json_inf_nan="constants")

    @model_validator(mode="wrap")
    @classmethod
    def _name_unknown_keys(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        given = renamed(value)
        try:
            made = handler(given)
        except ValidationError as error:
            details = [_with_hint(detail, cls) for detail in error.errors()]
            raise ValidationError.from_exception_data(cls.__name__, details) from None
        if isinstance(given, dict) and (wrong := _truths_as_numbers(given, made)):
            raise ValidationError.from_exception_data(cls.__name__, wrong)
        return made

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler.resolve_ref_schema(handler(core))
        if "description" in schema:  # an editor shows it: a key needs no example in Python
            schema["description"] = schema["description"].partition(EXAMPLES)[0]
        return schema


def renamed(value: Any) -> Any:
    """A YAML mapping with older spellings of its keys as they are now; where both are given, the older stays, an unknown key."""
    if not isinstance(value, dict):
        return value
    return {FORMER[key] if key in FORMER and FORMER[key] not in value else key: item for key, item in value.items()}


class Plugin(Spec):
    """Base of everything that lives in a plug-in folder; `kind` in YAML is the file's name. aliases: older names of it."""

    aliases: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def kind(cls) -> str:
        """The plug-in's name: that of its file."""
        return cls.__module__.rpartition(".")[2]

    @model_validator(mode="before")
    @classmethod
    def _drop_kind(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("kind") in (cls.kind(), *cls.aliases):
            return {key: item for key, item in value.items() if key != "kind"}
        return value

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = super().__get_pydantic_json_schema__(core, handler)
        schema.setdefault("properties", {})["kind"] = {"const": cls.kind()}
        return schema

    @model_serializer(mode="wrap")
    def _add_kind(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {"kind": self.kind(), **handler(self)}


def _with_hint(detail: ErrorDetails, cls: type[BaseModel]) -> InitErrorDetails:
    """The same error; an unknown key of `cls` itself gets the nearest known one."""
    kind: str | PydanticCustomError = detail["type"]
    context = detail.get("ctx", {})
    if kind == "extra_forbidden" and len(detail["loc"]) == 1:
        kind = PydanticCustomError("unknown_key", "unknown key; {hint}", {"hint": nearest(str(detail["loc"][0]), cls.model_fields)})
    elif kind not in _PYDANTIC_ERRORS:
        kind = PydanticCustomError(detail["type"], detail["msg"], context)
    return InitErrorDetails(type=kind, loc=detail["loc"], input=detail["input"], ctx=context)


def _truths_as_numbers(given: dict[Any, Any], made: BaseModel) -> list[InitErrorDetails]:
    """Where `true`, and what YAML takes for it (`yes`, `on`), became the number 1."""
    found = []
    for name, field in type(made).model_fields.items():
        others = field.validation_alias.choices if isinstance(field.validation_alias, AliasChoices) else [field.validation_alias]
        key = next((key for key in (name, *others) if key in given), name)  # as the user wrote it
        whole, values = given.get(key), getattr(made, name)
        pairs = (
            zip(whole, values, strict=False) if isinstance(whole, list | tuple) and isinstance(values, tuple) else [(whole, values)]
        )
        for one, value in pairs:
            if isinstance(one, bool) and isinstance(value, int | float) and not isinstance(value, bool):
                found.append(InitErrorDetails(type="float_type", loc=(str(key),), input=one))
    return found


_PYDANTIC_ERRORS = frozenset(get_args(ErrorType))

P = TypeVar("P", bound=Plugin)


class Schema:
    """What JSON schema says of a type in place of pydantic's own; made when it is asked for, which a run never does."""

    def __init__(self, made: Callable[[], JsonSchemaValue]) -> None:
        self.made = made

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return self.made()


class Folder(Generic[P]):
    """The plug-ins of one package, e.g. `Folder("fedmerge.merging.methods", Method, "method")`."""

    def __init__(self, package: str, base: type[P], what: str) -> None:
        self.package, self.base, self.what = package, base, what

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of all plug-ins, sorted; nothing is imported but the (empty) package."""
        path = importlib.import_module(self.package).__path__
        return tuple(sorted(module.name for module in pkgutil.iter_modules(path) if not module.name.startswith("_")))

    def load(self, name: str) -> type[P]:
        """The class that file `name` defines. Raises ScenarioError with the nearest name if there is no such file."""
        if name not in self.names:
            raise ScenarioError([Problem(self.what, "", f"'{name}'", f"a known {self.what}", nearest(name, self.names))])
        module = importlib.import_module(f"{self.package}.{name}")
        found = [
            item
            for item in vars(module).values()
            if isinstance(item, type)
            and issubclass(item, self.base)
            and item.__module__ == module.__name__
            and not item.__name__.startswith("_")
        ]
        if len(found) != 1:
            raise TypeError(f"{module.__name__} must define exactly one public {self.base.__name__}, not {len(found)}")
        return found[0]

    def union(self) -> Any:
        """A pydantic type that accepts any plug-in of the folder, told apart by `kind`."""
        tagged = [Annotated[self.load(name), Tag(name)] for name in self.names]

        def kind_of(value: Any) -> str | None:
            if isinstance(value, Plugin):
                return value.kind()
            kind = value.get("kind") if isinstance(value, dict) else None
            return self.aliases.get(kind, kind) if isinstance(kind, str) else kind

        return Annotated[Union[tuple(tagged)], Discriminator(kind_of)]  # noqa: UP007 - built from a run-time tuple

    @cached_property
    def aliases(self) -> dict[str, str]:
        """Older names of plug-ins, and the names that they have now."""
        return {alias: name for name in self.names for alias in self.load(name).aliases}


def by_name(folder: Folder[Any]) -> Any:
    """A plug-in of a folder as scenarios write it: `eam`, or `{eam: {gamma: 10}}`; errors are reported below the name."""

    def entry(value: Any) -> Any:
        if isinstance(value, Plugin):
            return value
        name: Any = value
        fields: Any = {}
        if isinstance(value, dict) and len(value) == 1:
            ((name, fields),) = value.items()
        if not isinstance(name, str) or not isinstance(fields, dict | None):
            article = "an" if folder.what.startswith("a") else "a"
            raise ValueError(f"{article} {folder.what} is its name, or one name with a mapping of its fields below it")
        name = folder.aliases.get(name, name)
        if name not in folder.names:
            raise ValueError(f"no such {folder.what}: {nearest(name, folder.names)}")
        return {"kind": name, **(fields or {})}

    def schema() -> JsonSchemaValue:
        one = {
            "type": "object",
            "properties": {name: folder.load(name).model_json_schema() for name in folder.names},
            "additionalProperties": False,
            "minProperties": 1,
            "maxProperties": 1,
        }
        return {"anyOf": [{"enum": list(folder.names)}, one]}

    return Annotated[folder.union(), BeforeValidator(entry), Schema(schema)]


def as_written(entries: Sequence[Plugin]) -> list[Any]:
    """Plug-ins of a list as `by_name` reads them."""
    return [{entry.kind(): entry.model_dump(mode="json", exclude={"kind"})} for entry in entries]
