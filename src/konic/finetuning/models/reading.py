"""Location of a model -> model and tokenizer: `from_pretrained`, within the checks of a stranger's files."""

from collections.abc import Mapping
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from konic.finetuning.errors import ModelError
from konic.finetuning.hub import hub_cause, hub_or_cache
from konic.finetuning.models.containment import require_bounded_tokenizer, require_contained
from konic.finetuning.models.headers import bounded_by_files
from konic.finetuning.models.locations import OWN_CODE, loading_failed, quiet_transformers


def read_model(
    kind: Any,
    location: str,
    asked: str,
    model_kwargs: Mapping[str, Any],
    *,
    tokenizer_at: tuple[str, bool] | None = None,
    own_code: str = OWN_CODE,
    **options: Any,
) -> tuple[PreTrainedModel, dict[str, Any], PreTrainedTokenizerBase]:
    """Read a model and its tokenizer from a folder or the Hub. The model's own code runs only if it is trusted.

    Args:
        kind: A class with `from_pretrained`, such as AutoModelForCausalLM.
        location: A folder or a Hub id.
        asked: The user's setting as messages show it, such as `base_model='gpt2'`.
        model_kwargs: The user's arguments for `from_pretrained`.
        tokenizer_at: Where the tokenizer is, and whether its code is trusted; None for the model's location and trust.
        own_code: What to do if a model is trusted that contains its own code.
        options: Arguments for `from_pretrained` that go before the user's.

    Returns:
        The model, what `from_pretrained` says of its loading, and the tokenizer.

    Raises:
        ModelError: There is no such model, or it cannot be loaded, or its files are not safe to read.
    """
    kwargs = {"trust_remote_code": False, **model_kwargs, **options}
    place, is_trusted = tokenizer_at or (location, kwargs["trust_remote_code"])
    hub = {name: kwargs[name] for name in ("revision", "token") if name in kwargs} | {"trust_remote_code": is_trusted}
    try:
        with hub_or_cache(location), quiet_transformers():
            require_contained(location, asked, model_kwargs)
            with bounded_by_files(location, asked, model_kwargs):
                model, info = kind.from_pretrained(location, use_safetensors=True, output_loading_info=True, **kwargs)
            require_bounded_tokenizer(place, asked, hub)
            tokenizer = AutoTokenizer.from_pretrained(place, **hub)
            tokenizer("", verbose=False)  # a wrong model_max_length is noticed only in use
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(loading_failed(asked, location, error, own_code)) from hub_cause(error, location)
    return model, info, tokenizer
