"""Checks an engine whose prefill and decode have devices of their own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from simulated import FLAGS, environment, run_simulated
from small_models import small_model

from dsv3_jax.cli.main import main
from dsv3_jax.config import ModelConfig
from dsv3_jax.data import Tokenizer
from dsv3_jax.data.tokenizer_training import byte_tokenizer
from dsv3_jax.errors import ConfigError
from dsv3_jax.inference import GREEDY, DeviceSets, complete
from dsv3_jax.interop import save_hf
from dsv3_jax.modules.paged_cache import Pages
from dsv3_jax.sharding.mesh import MeshConfig


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_text_on_two_sets_is_that_of_one_device() -> None:
    result = run_simulated(Path(__file__).with_name("simulated_sets.py"))
    assert result["same_text"]
    assert result["same_experts"]
    assert result["error"] < 1e-3
    assert result["same_text_of_new_weights"]
    assert result["went_on_alone"]
    assert result["compilations"] == 0
    # A prompt on its way has pages of the decode set alone; cancelled, it has none, and no other request has either.
    assert result["held"] == [0, 1]
    assert result["released"] == [0, 0]
    assert not result["left_over"]
    # The decode set was full: requests waited and were read again, from pages that the prefill set still had.
    assert result["preemptions"] > 0
    assert result["reused"] > 0
    assert result["placed_again"] == [True, True]
    # Two copies in the decode set and four in the prefill set, by the load that each has measured itself.
    assert result["placed_by"].keys() == {"2", "4"}
    assert result["placed_by"]["2"] != result["placed_by"]["4"]
    assert {
        'dsv3_set_requests_waiting{set="prefill"} 0',
        'dsv3_set_requests_waiting{set="decode"} 1',
        'dsv3_set_requests_running{set="prefill"} 0',
        'dsv3_set_requests_running{set="decode"} 0',
        'dsv3_set_pages{set="prefill"} 32',
        'dsv3_set_pages{set="decode"} 32',
        'dsv3_set_pages_free{set="prefill"} 32',
        'dsv3_set_pages_free{set="decode"} 31',
    } == set(result["metrics"])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_command_generates_on_two_sets(tmp_path: Path) -> None:
    """Weights are read straight to the decode set, here sharded over the fsdp axis too."""
    tokenizer = Tokenizer(byte_tokenizer(), "the test's tokenizer")
    config = ModelConfig.preset("tiny", vocab_size=tokenizer.vocab_size, initializer_range=0.2)
    model = small_model(config, 1)
    save_hf(model, tmp_path / "little", tokenizer=tokenizer)
    words = [str(tmp_path / "little"), "--prompt", "def f(", "--max-new-tokens", "12", "--temperature", "0"]
    words += ["--prefill", "expert=2,tensor=2", "--decode", "data=2,fsdp=-1"]
    command = [sys.executable, "-m", "dsv3_jax.cli.main", "generate", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(**FLAGS), check=False)
    assert done.returncode == 0, done.stderr
    written = complete(model, [tokenizer.encode("def f(")], 12, GREEDY, stop_token=tokenizer.end_ids)
    assert done.stdout == "def f(" + tokenizer.decode(written[0]) + "\n"


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float8_e4m3fn])
def test_copied_pages_have_every_bit(dtype) -> None:
    """Latents, rotary keys, scales and experts of all layers, the MTP block's too, under other page numbers."""
    config = ModelConfig.preset("tiny")
    random = np.random.default_rng(0)

    def filled(count: int) -> Pages:
        empty = Pages.empty(config, count, 4, jnp.dtype(dtype), mtp=True, experts=True)
        assert (empty.scale is not None) == (dtype == jnp.float8_e4m3fn)
        return jax.tree.map(lambda x: jnp.asarray(random.standard_normal(x.shape) * 9, x.dtype), empty)

    source, target = filled(7), filled(5)
    taken, to = [6, 0, 3, 7], [1, 4, 0, 5]  # the last is no page on either side
    done = target.with_pages(jnp.asarray(to), source.of(jnp.asarray(taken)))
    for name in ("latent", "rope_key", "scale", "experts"):
        before, after, new = (getattr(pages, name) for pages in (target, done, source))
        if before is None:
            continue
        want = np.array(before)
        for page, other in zip(to[:3], taken[:3], strict=True):
            if name == "experts":
                want[page] = new[other]
            else:
                want[:, page] = new[:, other]
        np.testing.assert_array_equal(np.asarray(after), want, err_msg=name)


FOUR = MeshConfig(expert=4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DeviceSets(prefill=FOUR, decode=FOUR).devices(), r"take 4 \+ 4 devices, but there are"),
        (lambda: DeviceSets(prefill=MeshConfig(data=-1), decode=MeshConfig(expert=-1)), "only one of the meshes"),
        (lambda: DeviceSets(prefill=FOUR, decode=MeshConfig(stage=2)), "sets.decode: an engine has no pipeline"),
        (lambda: DeviceSets(prefill=FOUR, decode=FOUR, chunks_ahead=0), "chunks_ahead must be at least 1, not 0"),
    ],
)
def test_sets_that_cannot_be_are_named(make, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prefill", "expert=4"], "--prefill and --decode are two sets of devices: give both"),
        (["--prefill", "exprt=4", "--decode", "expert=4"], "did you mean expert?"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "serve"])
def test_wrong_options_are_one_line(command: str, options: list[str], message: str, capsys) -> None:
    assert main([command, "runs/none", *options]) == 2
    error = capsys.readouterr().err
    assert re.search(re.escape(message), error)
    assert error.count("\n") == 1
