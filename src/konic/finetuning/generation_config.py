"""GenerationConfig: how responses are sampled. Loads no torch."""

from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from konic.finetuning.settings import MAX_SECONDS, Settings

_TokenId = Annotated[int, Field(ge=0)]

LOWEST_VLLM_TEMPERATURE = 0.01
"""vLLM 0.32 raises a lower temperature to this one."""
FIXED_VLLM_ARGUMENTS = frozenset(
    f"--{name}"
    for name in (
        "api-key", "config", "enable-lora", "generation-config", "host", "logprobs-mode", "model", "port",
        "served-model-name", "trust-remote-code", "uds",
    )
)  # fmt: skip
"""What a server of konic's own is always started with, or never."""


def _flag(argument: str) -> str:
    """Return the name of an argument such as --api_key=x as vLLM understands it."""
    return argument.partition("=")[0].replace("_", "-")


class GenerationConfig(Settings):
    """How responses are sampled, in training, `evaluate` and `generate` alike."""

    successors = MappingProxyType({"max_length": "Prompts are cut to max_prompt_length, responses to max_new_tokens."})

    max_new_tokens: int = Field(default=48, ge=1)
    """The most tokens of a response; the end-of-sequence token counts."""
    min_new_tokens: int = Field(default=1, ge=0)
    """The fewest tokens of a response that no `stop` string ends; the end-of-sequence token counts. Above 1 it changes
    the distribution."""
    max_prompt_length: int = Field(default=256, ge=1)
    """The most tokens of a prompt; a longer one loses its beginning."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides the logits, in sampling and in training alike."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the smallest set of tokens with this much probability; below 1 it changes the distribution."""
    top_k: int = Field(default=0, ge=0)
    """Sample from so many of the likeliest tokens; 0 means all. Above 0 it changes the distribution."""
    decode_layout: Literal["onednn", "plain", "mkl", "auto"] | None = None
    """Where the numbers of the weights stand in memory while a CPU samples; "mkl" is for fp32. None takes what suits
    the maker of the processor; "auto" measures once what is fastest here, on a machine without other work. A resume
    keeps either. Layouts differ by rounding only."""
    do_sample: bool = True
    """False takes the likeliest token."""
    repetition_penalty: float = Field(default=1.0, gt=0)
    """Divides the positive and multiplies the negative logits of tokens that are in the text already. Other values than
    1 change the distribution."""
    skip_special_tokens: bool = False
    """Leave special tokens, such as `<think>`, out of the text that rewards get; the end token is never in it."""
    stop: tuple[str, ...] | None = None
    """Strings that end a response. Its text is cut before them."""
    eos_token_id: _TokenId | Annotated[tuple[_TokenId, ...], Field(min_length=1)] | None = None
    """Tokens that end a response; None takes those of the model and of the tokenizer."""
    pad_token_id: _TokenId | None = None
    """The token that fills padding. It never changes a result."""
    engine: Literal["local", "vllm"] = "local"
    """What samples the responses of a training: konic itself, or a vLLM server (docs/vllm.md). `evaluate` and
    `generate` always sample with konic itself."""
    vllm_address: str | None = None
    """A running server, such as "http://127.0.0.1:8000". The variable VLLM_API_KEY holds its key."""
    vllm_python: str | None = None
    """The Python of an environment with vLLM. konic starts a server of its own there, and ends it with the run."""
    vllm_arguments: tuple[str, ...] = ()
    """More arguments of the command line for a server that konic starts, such as "--gpu-memory-utilization=0.4"."""
    vllm_folder: str | None = None
    """Where each iteration's weights are written, under a path that the server can read too; None takes a temporary
    folder, which a server on the same machine can read."""
    vllm_timeout_seconds: float = Field(default=600.0, gt=0, le=MAX_SECONDS)
    """The most seconds that the server may take to start, to load weights, or to sample an iteration's responses."""

    @model_validator(mode="before")
    @classmethod
    def _one_stop_string_is_a_list_of_one(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("stop"), str):
            return {**values, "stop": (values["stop"],)}
        return values

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(f"min_new_tokens={self.min_new_tokens} is above max_new_tokens={self.max_new_tokens}")
        if self.stop is not None and not all(self.stop):
            raise ValueError("stop holds an empty string, which would end every response at once")
        return self

    @model_validator(mode="after")
    def _check_engine(self) -> Self:
        if self.engine == "local":
            named = self.vllm_address or self.vllm_python
            if named and "engine" not in self.model_fields_set:
                raise ValueError(f"{named!r} is for the engine 'vllm': set engine='vllm' too")
            return self
        if (self.vllm_address is None) == (self.vllm_python is None):
            raise ValueError(
                "engine='vllm' needs either vllm_address, a server that runs, or vllm_python, the Python of an "
                "environment with vLLM, from which konic starts one"
            )
        if self.vllm_address is not None and self.vllm_arguments:
            raise ValueError("vllm_arguments are for a server that konic starts; give those of vllm_address to it")
        fixed = [name for name in map(_flag, self.vllm_arguments) if name in FIXED_VLLM_ARGUMENTS]
        if fixed:
            raise ValueError(f"vllm_arguments holds {fixed[0]}, which konic decides for its own server: leave it out")
        if self.distribution_filters:
            raise ValueError(
                f"engine='vllm' cannot take {', '.join(self.distribution_filters)}: the log-probs of the server would "
                "be of another distribution than the one trained. Leave it out, or use engine='local'"
            )
        if self.temperature < LOWEST_VLLM_TEMPERATURE:
            raise ValueError(
                f"temperature={self.temperature:g} is below {LOWEST_VLLM_TEMPERATURE:g}, to which vLLM would raise it"
            )
        return self

    @property
    def distribution_filters(self) -> list[str]:
        """The settings that make sampling draw from another distribution than the one trained, as `name=value`."""
        neutral = {"top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "do_sample": True}
        names = [name for name, value in neutral.items() if getattr(self, name) != value]
        if self.min_new_tokens > 1:
            names.append("min_new_tokens")
        return [f"{name}={getattr(self, name)}" for name in names]
