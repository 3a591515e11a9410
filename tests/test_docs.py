"""What the documents say is what the code does."""

import dataclasses
import importlib.util
import inspect
import re
from pathlib import Path

import pytest

import konic.finetuning
from konic.cli.scripts import load_agent
from konic.finetuning import (
    ConfigError,
    DatasetConfig,
    FinetuningIterationResult,
    GenerationConfig,
    KonicFinetuningCallback,
    KonicFinetuningEngine,
    LoraConfig,
    TrainingConfig,
)

ROOT = Path(__file__).parent.parent
_spec = importlib.util.spec_from_file_location("docs_make", ROOT / "docs" / "make.py")
make = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make)


def test_what_is_made_from_the_code_is_up_to_date():
    page = (ROOT / "docs/metrics.md").read_text()
    assert make.with_table(page) == page, "run: python docs/make.py"
    assert (ROOT / "docs/packages.svg").read_text() == make.picture(), "run: python docs/make.py"


def test_every_metric_has_one_line_with_its_meaning():
    names = re.findall(r"^\| `(\w+)` \|.*\S \|$", (ROOT / "docs/metrics.md").read_text(), flags=re.MULTILINE)
    assert names == [field.name for field in dataclasses.fields(FinetuningIterationResult)]


def test_the_picture_shows_every_package_and_no_arrow_that_a_longer_way_implies():
    arrows = {"engine": {"trainer", "run"}, "trainer": {"run"}, "run": set()}
    assert make.direct(arrows) == {"engine": {"trainer"}, "trainer": {"run"}, "run": set()}
    assert make.floors(arrows) == {"engine": 2, "trainer": 1, "run": 0}
    folders = {path.parent.name for path in (ROOT / "src/konic/finetuning").glob("*/__init__.py")}
    assert folders < make.imports().keys()
    assert "rollout" in make.imports()["learning"]


def test_every_setting_is_documented():
    text = (ROOT / "docs/configuration.md").read_text()
    for kind in (TrainingConfig, GenerationConfig, DatasetConfig, LoraConfig):
        missing = [name for name in kind.model_fields if f"`{name}`" not in text]
        assert not missing, kind.__name__
    sections = text.split("## ")
    for kind in (TrainingConfig, GenerationConfig, DatasetConfig, LoraConfig):
        (section,) = [part for part in sections if part.startswith(kind.__name__)]
        names = re.findall(r"^\| (`.*?) \| (.*?) \|", section, flags=re.MULTILINE)
        for cell, defaults in names:
            for name, shown in zip(re.findall(r"`(\w+)`", cell), defaults.split(", "), strict=False):
                default = kind.model_fields[name].get_default(call_default_factory=True, validated_data={})
                told = shown.partition(";")[0].strip("`").strip('"')
                assert told in (str(default), getattr(default, "name", None)), f"{kind.__name__}.{name}"


def test_every_public_name_has_its_place_in_the_reference():
    shown = set(re.findall(r"^::: konic\.finetuning\.(\w+)$", (ROOT / "docs/api.md").read_text(), flags=re.MULTILINE))
    assert shown | {"BaseKonicLLMRewardComposer"} == set(konic.finetuning.__all__)  # the other name of a class


def test_the_site_builds_strictly_from_its_own_files_alone():
    settings = (ROOT / "mkdocs.yml").read_text()
    assert "strict: true" in settings
    assert "font: false" in settings  # the theme's fonts would come from Google
    assert "docs: $(READY)" in (ROOT / "Makefile").read_text()
    assert "check: $(READY) docs" in (ROOT / "Makefile").read_text()


def test_the_names_of_trl_lead_to_fields_that_exist_and_the_errors_say_the_same():
    text = (ROOT / "docs/coming-from-trl.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)\.?(\w*)(?:\((\w+)=\))?`", text, flags=re.MULTILINE)
    assert len(rows) > 40
    for theirs, owner, member, argument in rows:
        place = getattr(konic.finetuning, owner)
        fields = getattr(place, "model_fields", None)
        if fields is not None:
            assert member in fields, theirs
        else:
            called = getattr(place, member or "__init__")
            assert argument in inspect.signature(called).parameters, theirs
        ours = argument or member
        if theirs not in TrainingConfig.model_fields:
            with pytest.raises(ConfigError, match=rf"\b{ours}\b"):
                TrainingConfig(**{theirs: 1})


def test_the_readme_shows_the_example_as_it_is():
    example = (ROOT / "examples/first_reward.py").read_text()
    for page in ("README.md", "docs/quickstart.md"):
        assert f"```python\n{example}```" in (ROOT / page).read_text(), page


def test_the_readmes_tree_names_every_module():
    text = (ROOT / "README.md").read_text()
    for path in (ROOT / "src/konic").rglob("*.py"):
        if path.name != "__init__.py":
            assert re.search(rf"^ +{path.name} ", text, flags=re.MULTILINE), path.name


@pytest.mark.parametrize("script", ["examples/first_reward.py", "src/konic/demo.py"])
def test_the_examples_run_on_the_real_model(script, tmp_path):
    shorter = {"dataset_config": {"held_out": 4}, "generation_config": {"max_new_tokens": 16}}
    agent = load_agent(ROOT / script).with_settings(shorter)
    quiet = KonicFinetuningCallback(verbose=False)
    engine = KonicFinetuningEngine.from_agent(agent, checkpoint_dir=tmp_path, callback=quiet, device="cpu")
    result = engine.train(1).history[0]
    assert result.kl_divergence < 1e-6
    # exactly 0 where both come from the same shapes; a minibatch of its own shape differs by fp32 rounding
    assert result.first_log_ratio < 1e-4
    assert result.sampler_gap < 1e-5
    assert (tmp_path / "final" / "adapter_model.safetensors").exists()


def test_no_document_or_source_names_a_private_path():
    private = re.compile(r"/(?:work|root|home)/\w|\.\./shared|pypi\.org|pythonhosted", flags=re.IGNORECASE)
    for folder in ("src", "docs", "examples", "benchmarks", "."):
        for path in (ROOT / folder).glob("*") if folder == "." else (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix in (".py", ".md", ".toml", ".txt", ".jsonl", ".json"):
                assert not private.search(path.read_text()), path


def test_every_test_that_the_documents_name_exists():
    documents = [*(ROOT / "docs").glob("*.md"), ROOT / "SECURITY.md"]
    named = {name for path in documents for name in re.findall(r"`(test_\w+)`", path.read_text())}
    written = {
        name for path in (ROOT / "tests").rglob("*.py") for name in re.findall(r"def (test_\w+)", path.read_text())
    }
    assert len(named) > 20
    assert not named - written
