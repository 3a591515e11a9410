"""A reward's parameters -> how to call it: with which texts, and with which columns of the dataset."""

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

from konic.finetuning.data.samples import RESERVED
from konic.finetuning.errors import ConfigError, RewardError, did_you_mean
from konic.finetuning.rewards.marks import checked_flag
from konic.finetuning.rewards.outcomes import Reward

_TEXTS = {
    "sample": ("prompt", "response"),
    "batch": ("prompts", "responses"),
    "completions": ("prompts", "completions"),
}

Shape = Literal["sample", "batch", "completions"]
TextParameters = tuple[str | None, str | None] | None
"""Names of the parameters for the prompt and the response; None if both are passed by position."""


def detect_shape(function: Callable[..., Any]) -> Shape:
    """Decide from the parameter names of a plain function how to call it.

    - With `completions`, or with `prompts` and `**columns` but no `responses`: as TRL's
      `(prompts, completions, **columns)`.
    - Else with `prompts` or `responses`: as `(prompts, responses)`, on a whole batch.
    - Else: as `(prompt, response)`.

    Raises:
        RewardError: The parameters fit none of these.
    """
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        parameters = {}  # type: ignore[assignment]
    kinds = {parameter.kind for parameter in parameters.values()}
    takes_all = inspect.Parameter.VAR_KEYWORD in kinds and "responses" not in parameters
    if "completions" in parameters or ("prompts" in parameters and takes_all):
        return "completions"
    if "prompts" in parameters or "responses" in parameters:
        return "batch"
    places = [p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(places) < 2 and "response" not in parameters and inspect.Parameter.VAR_POSITIONAL not in kinds:
        raise RewardError(
            f"A reward function takes (prompt, response), (prompts, responses) or TRL's (prompts, completions, "
            f"**columns); {getattr(function, '__name__', function)!r} takes ({', '.join(parameters)})."
        )
    return "sample"


def shape_of_method(method: Any, batch: bool) -> Shape:
    """The shape of a marked method: with `batch`, or with parameters for many texts and none for one, a whole batch."""
    if batch:
        return "batch"
    try:
        names = set(inspect.signature(method).parameters)
    except (TypeError, ValueError):
        return "sample"
    takes_many = names & {"prompts", "responses", "completions"} and not names & {"prompt", "response"}
    return detect_shape(method) if takes_many else "sample"


def reward_of_model(model: Any) -> Reward:
    """The reward that a reward model gives: its name, the method that scores, and that method's shape.

    Raises:
        ConfigError: The object has no name or no such method, or is a class.
    """
    if isinstance(model, type):
        raise ConfigError(f"A reward model must be an object, got {model!r}. Give an instance: {model.__name__}().")
    name, own = getattr(model, "name", None), _scoring_method(model)
    if not isinstance(name, str) or own is None:
        advice = " Plain functions go to add_reward_function." if callable(model) else ""
        raise ConfigError(f"A reward model needs a name and a method score(prompts, responses); got {model!r}.{advice}")
    normalize = getattr(model, "normalize", None)
    is_flag = normalize is not None and not callable(normalize)  # a method of this name is the model's own
    normalize = is_flag and checked_flag(f"Reward model {name!r}: normalize", normalize)
    shape: Literal["batch", "sample"] = "sample" if own == "compute_reward" else "batch"
    return Reward(name, getattr(model, own), shape, is_model=True, normalize=normalize)


def _scoring_method(model: Any) -> str | None:
    """The name of a reward model's method; the one that its most derived class has, where it inherits others.

    Beside `compute_reward`, a method with other parameters than prompts and responses is a helper.
    """
    names = [name for name in ("score", "batch_compute_reward", "compute_reward") if callable(getattr(model, name, 0))]
    if "compute_reward" in names:
        names = [name for name in names if name == "compute_reward" or _takes_a_batch(getattr(model, name))]
    for own in (getattr(model, "__dict__", {}), *map(vars, type(model).__mro__)):
        for name in names:
            if callable(own.get(name)):
                return name
    return next(iter(names), None)


def _takes_a_batch(method: Any) -> bool:
    try:
        return {"prompts", "responses"} <= set(inspect.signature(method).parameters)
    except (TypeError, ValueError):  # written in C
        return False


def text_parameters(reward: Reward, columns: Mapping[str, Any]) -> TextParameters:
    """Find the parameters for the prompt and the response by name, in any order.

    If only the prompt's name is there, the response goes to the first parameter that no column fills. If only the
    response's name is there, the prompt goes to the parameter before it, if that is the first and no column fills it.
    `**kwargs` takes a text that no parameter by position could take.

    Returns:
        Both names, or None if both texts are passed by position.

    Raises:
        RewardError: There is no parameter for the response, or a text's parameter before `/` has another's place.
    """
    parameters = inspect.signature(reward.call).parameters.values()
    if any(p.kind is p.POSITIONAL_ONLY for p in parameters):
        places = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        for place, text in enumerate(_TEXTS[reward.shape]):
            if any(p.name == text for p in parameters) and text not in places[place : place + 1]:
                raise RewardError(
                    f"{reward.who} takes {text!r} at another place than ({', '.join(_TEXTS[reward.shape])}, /). Leave "
                    "out the `/` of its parameters, or put them in that order."
                )
        return None
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    prompt, response = _TEXTS[reward.shape]
    takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    if reward.shape == "completions":
        return (prompt if takes_all or prompt in names else None), (
            response if takes_all or response in names else None
        )
    if response in names and prompt in names:
        return prompt, response
    others = [name for name in names if name != prompt and name not in columns]
    if prompt in names and others:
        return prompt, others[0]
    if _takes_texts_by_keyword(parameters, prompt, response):
        return prompt, response
    if response in names:
        return (names[0] if names.index(response) == 1 and names[0] not in columns else None), response
    if prompt in names:
        raise RewardError(f"{reward.who} takes no response: its parameters are {', '.join(names)}.")
    return None


def _takes_texts_by_keyword(parameters: Collection[inspect.Parameter], prompt: str, response: str) -> bool:
    """True with `**kwargs` and no parameter by position but for those that have the names of the two texts."""
    by_name = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    return takes_all and all(
        p.kind in by_name or (p.kind is p.POSITIONAL_OR_KEYWORD and p.name in (prompt, response)) for p in parameters
    )


def require_a_response(reward: Reward) -> None:
    """Raise RewardError for a reward whose parameters leave no place for a response."""
    try:
        parameters = inspect.signature(reward.call).parameters
    except (TypeError, ValueError):  # written in C
        return
    kinds = [parameter.kind for parameter in parameters.values()]
    places = sum(kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD) for kind in kinds)
    takes_more = inspect.Parameter.VAR_POSITIONAL in kinds
    by_keyword = _takes_texts_by_keyword(parameters.values(), *_TEXTS[reward.shape])
    named = {"response", "responses", "completions"} & set(parameters)
    if places < 2 and not takes_more and not by_keyword and not named:
        shown = ", ".join(parameters) or "nothing"
        raise RewardError(f"{reward.who} takes no response. Its parameters are (prompt, response), not {shown}.")


def requested_columns(reward: Reward, columns: Mapping[str, Any]) -> list[str]:
    """The dataset's columns that a reward asks for by its parameters other than prompt and response.

    Raises:
        RewardError: The reward asks for a column that the dataset does not have.
    """
    parameters = list(inspect.signature(reward.call).parameters.values())
    taken = text_parameters(reward, columns)
    if taken is None:
        places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][:2]
        column = next((p.name for p in places if p.name in columns), None)
        if column is not None:
            raise RewardError(
                f"{reward.who} has a parameter {column!r}, which is a column of the dataset, where it would get the "
                f"prompt or the response. Name its parameters: (prompt, response, {column})."
            )
        rest = [parameter for parameter in parameters if parameter not in places]
    else:
        rest = [parameter for parameter in parameters if parameter.name not in taken]
    wanted = []
    for parameter in rest:
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            return [name for name in columns if name not in RESERVED]
        if parameter.name in columns:
            wanted.append(parameter.name)
        elif parameter.default is inspect.Parameter.empty and parameter.kind is not inspect.Parameter.VAR_POSITIONAL:
            if parameter.name == "messages":
                raise RewardError(
                    f"{reward.who} asks for 'messages', the chat of a prompt, but the prompts are plain text. A column "
                    "of that name must be renamed to reach rewards."
                )
            if parameter.name in RESERVED:
                raise RewardError(
                    f"{reward.who} has the parameter {parameter.name!r}, beside those for the prompt and the response. "
                    "A dataset's column of that name must be renamed to reach rewards."
                )
            raise RewardError(
                f"{reward.who} asks for the column {parameter.name!r}, which the dataset does not have."
                f"{did_you_mean(parameter.name, columns)} Its other columns: {', '.join(columns) or 'none'}."
            )
    return wanted
