"""The demo's job with every way to the network closed: nothing of ours or of a dependency's asks for it."""

import subprocess
import sys
import textwrap


def test_the_demos_job_opens_no_connection(tmp_path):
    script = f"""
        import socket

        def closed(self, address, *rest):
            if self.family != socket.AF_UNIX:
                print("REACHED OUT", address, flush=True)
                raise OSError("the network is closed")
            return plain(self, address, *rest)

        plain = socket.socket.connect
        socket.socket.connect = socket.socket.connect_ex = closed

        def unresolved(host, *rest, **options):
            print("ASKED FOR", host, flush=True)
            raise socket.gaierror("the network is closed")

        socket.getaddrinfo = unresolved

        from konic.demo import build_agent
        from konic.finetuning import DatasetConfig, DatasetSource, KonicFinetuningAgent, KonicFinetuningEngine

        full = build_agent()
        agent = KonicFinetuningAgent(
            base_model=full.get_base_model(),
            reward_composer=full.get_reward_composer(),
            lora_config=full.get_lora_config(),
            dataset_config=DatasetConfig(source=DatasetSource.BUNDLED, held_out=2),
            training_config={{"batch_size": 2, "ppo_epochs": 1}},
            generation_config={{"max_new_tokens": 3, "max_prompt_length": 64}},
        )
        KonicFinetuningEngine.from_agent(agent, checkpoint_dir={str(tmp_path / "run")!r}).train(1)
        try:
            socket.create_connection(("pypi.org", 443))
        except OSError:
            print("the network was closed")
        """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    reached = [line for line in ended.stdout.splitlines() if line.startswith(("REACHED", "ASKED"))]
    assert reached == ["ASKED FOR pypi.org"]
    assert "the network was closed" in ended.stdout
    assert (tmp_path / "run" / "final" / "adapter_model.safetensors").is_file()
