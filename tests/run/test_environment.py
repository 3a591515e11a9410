from konic.finetuning.run import environment as module
from konic.finetuning.run.environment import version_of


def test_the_version_of_a_package_that_runs_from_its_source_folder_is_no_error(monkeypatch):
    assert version_of("torch")[0].isdigit()
    assert version_of("no-such-package") == "not installed"
    monkeypatch.setattr(module, "_LIBRARIES", ("no-such-package",))
    assert module.environment(module.torch.device("cpu"))["no-such-package"] == "not installed"
