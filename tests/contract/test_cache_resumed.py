"""Checkpoints of cached requests: what the cache kept is in them, and a resumed request is the undisturbed one."""

from __future__ import annotations

import queue
from typing import Any

import pytest

from denoised import Omni, OmniRequestOutput
from denoised.outputs import Saved
from denoised.request import Service
from denoised.runtime.checkpoints import Checkpoint
from tests.contract.support import EXACT, as_omni, difference, engine, media, request_of
from tests.contract.test_cache import STEPS, cached, decisions, report


def saved(omni: Omni, name: str, every: int) -> tuple[OmniRequestOutput, list[Checkpoint]]:
    """A row's first request undisturbed, and its checkpoints."""
    prompt, params = as_omni({**request_of(name, 0), "num_inference_steps": STEPS}, 3, "latent")
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    omni._client.submit(omni._request("watched", prompt, params, Service(checkpoint_every=every)), inbox.put)
    heard = [inbox.get()]
    while not isinstance(heard[-1], OmniRequestOutput):
        heard.append(inbox.get())
    assert heard[-1].error is None, heard[-1].error
    return heard[-1], [event.checkpoint for event in heard if isinstance(event, Saved)]


@pytest.mark.parametrize(
    ("name", "kind"), [("flux_dev", "dbcache"), ("qwen_image", "taylorseer"), ("flux_dev", "tea_cache")]
)
def test_resumed_is_undisturbed_decision_for_decision(name: str, kind: str) -> None:
    """What the cache kept is in the checkpoint, in another process too: the same bytes, and the same steps skipped."""
    with cached(name, kind, deterministic=True) as omni:
        whole, checkpoints = saved(omni, name, every=2)
    with cached(name, kind, deterministic=True) as omni:
        for checkpoint in checkpoints:
            (again,) = omni.resume(Checkpoint.from_bytes(checkpoint.to_bytes()), use_tqdm=False)
            assert again.error is None, again.error
            assert difference(media(whole), media(again)) == EXACT
            assert decisions(again) == [steps[checkpoint.step :] for steps in decisions(whole)]
            assert again.receipt is not None
            assert again.receipt.resumed_from_step == checkpoint.step
            assert not [note for note in again.receipt.notes if note.startswith("resume")]
    assert [checkpoint.step for checkpoint in checkpoints] == [2, 4, 6]
    assert report(whole)["skipped"] > 0


def test_what_a_cache_kept_is_for_that_cache_alone() -> None:
    with cached("flux_dev", "dbcache") as omni:
        _, (checkpoint, *_) = saved(omni, "flux_dev", every=3)
    with cached("flux_dev", "taylorseer") as omni:
        (other,) = omni.resume(checkpoint, use_tqdm=False)
    assert other.error is not None
    assert "resume: the checkpoint was made with other settings of the cache" in other.error
    with engine("flux_dev") as omni:
        _, (plain, *_) = saved(omni, "flux_dev", every=3)
        (computed,) = omni.resume(checkpoint, use_tqdm=False)
    assert computed.receipt is not None
    assert any("here every step from there on is computed" in note for note in computed.receipt.notes)
    with cached("flux_dev", "dbcache") as omni:
        (fresh,) = omni.resume(plain, use_tqdm=False)
    assert fresh.receipt is not None
    assert fresh.receipt.resumed_from_step == 0
    assert any(note.startswith("resume: computed from the start") for note in fresh.receipt.notes)
