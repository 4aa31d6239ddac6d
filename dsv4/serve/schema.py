"""Parts of requests that several protocols share, as pydantic checks them, and how they become turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from dsv4.config.sampling import MAX_LOGPROBS, MAX_SEED, Sampling
from dsv4.serve.errors import ApiError
from dsv4.serve.turn import AnswerFormat, ToolChoice
from dsv4.text.message import Tool

MAX_CHOICES = 16
MAX_STOPS = 16

Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=-(2**63), le=MAX_SEED)]
Count = Annotated[int, Field(ge=1, le=2**31)]
Text = Annotated[str, Field(min_length=1)]
User = Annotated[str, Field(max_length=512)]
ToolName = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f\"<>]+$")]
NO_LIMIT = 2**31


class Loose(BaseModel):
    """A request whose unknown fields are ignored, as OpenAI's and DeepSeek's clients expect."""

    model_config = ConfigDict(extra="ignore")


def kind_of(part: Any) -> Any:
    """The ``type`` of a part of a request, as it comes or as it was read; None if it has none."""
    return part.get("type") if isinstance(part, Mapping) else getattr(part, "type", None)


class StreamOptions(Loose):
    include_usage: bool = False


class Function(BaseModel):
    model_config = ConfigDict(extra="allow")  # the prompt shows it as it is
    name: ToolName
    description: str | None = None
    parameters: dict[str, JsonValue] | None = None
    strict: bool | None = None


class FunctionTool(Loose):
    type: Literal["function"]
    function: Function


def tools_of(functions: Sequence[Function]) -> tuple[Tool, ...]:
    """Tools as the prompt shows them: what the client wrote, in its order. Two of one name are refused."""
    names = [function.name for function in functions]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ApiError(400, f"tools has {twice!r} twice; expected each name once", param="tools")
    return tuple(Tool(function=function.model_dump(exclude_unset=True)) for function in functions)


def check_choice(choice: ToolChoice, tools: Sequence[Tool]) -> ToolChoice:
    """Refuse a choice that no tool can meet."""
    names = [tool.name for tool in tools]
    if choice.kind == "named" and choice.name not in names:
        known = ", ".join(names) or "no tool"
        raise ApiError(400, f"tool_choice names {choice.name!r}; expected one of {known}", param="tool_choice")
    if choice.kind == "required" and not names:
        raise ApiError(400, "tool_choice is 'required' without tools; expected at least one", param="tool_choice")
    return choice


def json_schema_format(schema: Mapping[str, Any] | None) -> AnswerFormat:
    if schema is None:
        raise ApiError(400, "response_format has no schema; expected a JSON schema", param="response_format")
    return AnswerFormat(kind="json_schema", schema=schema)


class OpenAIRequest(Loose):
    """What OpenAI's requests for a chat and for a completion have in common. user_id: DeepSeek's name for user."""

    model: str
    max_tokens: Count | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    logit_bias: dict[str, Bias] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    seed: Seed | None = None
    ignore_eos: bool = False
    stop: Text | Annotated[list[Text], Field(max_length=MAX_STOPS)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: User | None = None
    user_id: User | None = None

    @property
    def owner(self) -> str:
        """Whose prefixes the request may share."""
        return self.user_id or self.user or ""

    @property
    def stops(self) -> tuple[str, ...]:
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def sampling(self, *, max_tokens: int | None, logprobs: int | None, stop: Sequence[str] = ()) -> Sampling:
        """How tokens are chosen. stop: strings that end the whole output, thinking too."""
        return sampling_of(
            max_tokens=max_tokens, temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, min_p=self.min_p,
            seed=self.seed, presence_penalty=self.presence_penalty, frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty, logit_bias=self.logit_bias, logprobs=logprobs, stop=stop,
            ignore_eos=self.ignore_eos,
        )  # fmt: skip


def sampling_of(
    *,
    max_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    seed: int | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    presence_penalty: float | None = None,
    frequency_penalty: float | None = None,
    repetition_penalty: float | None = None,
    logit_bias: Mapping[str, float] | None = None,
    logprobs: int | None = None,
    stop: Sequence[str] = (),
    ignore_eos: bool = False,
) -> Sampling:
    """How tokens are chosen; what the client left out is as the model was released."""
    given: dict[str, Any] = {
        name: value
        for name, value in (
            ("temperature", temperature), ("top_p", top_p), ("top_k", top_k), ("min_p", min_p),
            ("presence_penalty", presence_penalty), ("frequency_penalty", frequency_penalty),
            ("repetition_penalty", repetition_penalty),
        )
        if value is not None
    }  # fmt: skip
    return Sampling(
        max_tokens=NO_LIMIT if max_tokens is None else max_tokens, seed=None if seed is None else seed % 2**63,
        logit_bias=_bias(logit_bias or {}), logprobs=logprobs, stop=tuple(stop), ignore_eos=ignore_eos, **given,
    )  # fmt: skip


def num_logprobs(wanted: bool | None, top: int | None) -> int | None:
    """Of how many tokens chat clients want log-probabilities, from their two fields for it."""
    if not wanted:
        if top:
            wrong = f"top_logprobs is {top} without logprobs; expected logprobs: true"
            raise ApiError(400, wrong, param="top_logprobs")
        return None
    return min(top or 0, MAX_LOGPROBS)


def _bias(by_token: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    wrong = next((token for token in by_token if not (token.isascii() and token.isdigit() and len(token) < 10)), None)
    if wrong is not None:
        raise ApiError(400, f"logit_bias has the key {wrong!r}; expected ids of tokens", param="logit_bias")
    pairs = {int(token): value for token, value in by_token.items()}
    return tuple(pairs.items())
