"""Pydantic's findings as our one sentence: the field, the value and what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from denoised.server.problems import Refusal, invalid

# Fields of OpenAI's API that nothing here could act on, and what to do instead.
NOT_HONOURED = {
    "style": "describe it in the prompt",
    "moderation": "this server moderates nothing, so leave it out",
    "user": "this server keeps no record of users, so leave it out",
    "safety_identifier": "this server keeps no record of users, so leave it out",
    "input_fidelity": "use strength, if the model takes it",
    "markup": "use mask",
    "complexity": "leave it out",
    "svg": "use output_format png, jpeg or webp",
    "frame_count": "use output_format png, jpeg or webp",
    "frame_duration_ms": "use output_format png, jpeg or webp",
    "prompt_rewriter": "prompts are taken as they are, so leave it out",
    "temperature": "a diffusion model samples no tokens, so leave it out",
    "top_p": "a diffusion model samples no tokens, so leave it out",
    "max_tokens": "a diffusion model samples no tokens, so leave it out",
    "max_completion_tokens": "a diffusion model samples no tokens, so leave it out",
    "presence_penalty": "a diffusion model samples no tokens, so leave it out",
    "frequency_penalty": "a diffusion model samples no tokens, so leave it out",
    "logprobs": "a diffusion model samples no tokens, so leave it out",
    "stop": "a diffusion model samples no tokens, so leave it out",
    "tools": "a diffusion model calls no tools, so leave it out",
    "tool_choice": "a diffusion model calls no tools, so leave it out",
}
# Sampling parameters that are objects of Python, or of features that are not there.
NOT_OVER_HTTP = {
    "generator": "give a seed",
    "latents": "give a seed",
    "pil_image": "upload the picture",
    "output_type": "use output_format",
    "return_trajectory_latents": "ask for partial_images in a stream",
}
_FORMS = {"size": "WIDTHxHEIGHT in pixels, such as 1024x768, or auto", "seconds": "a whole number, such as 4"}
# What pydantic puts into places beside the names of fields.
_MARKS = frozenset({"body", "query", "path", "str", "float"})
_WORDS = {
    "missing": "is missing; give it",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be a string",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "union_tag_not_found": "must say its type",
    "string_pattern_mismatch": "is not of the form that it must have",
}


def refusal(errors: Sequence[Mapping[str, Any]], known: Iterable[str] = ()) -> Refusal:
    """A 400 for what pydantic found; `known` are the fields that the route takes."""
    unknown = next((e for e in errors if e["type"] == "extra_forbidden"), None)
    error = unknown or max(errors, key=lambda e: len(e["loc"]))  # of unions, the one that came furthest
    name = _name(error["loc"])
    if not name:
        return invalid(_body_problem(error))
    if unknown is not None:
        return invalid(_unknown(str(error["loc"][-1]), name, known), param=name)
    return invalid(_sentence(name, error), param=name)


def _name(loc: Sequence[Any]) -> str:
    """`messages.0.content`: where, without pydantic's own marks of unions."""
    parts = [str(part) for part in loc if part not in _MARKS]
    return ".".join(part for part in parts if part.replace("_", "").isalnum() and not part[:1].isupper())


def _body_problem(error: Mapping[str, Any]) -> str:
    if error["type"] == "value_error":
        return f"{str(error['msg']).removeprefix('Value error, ')}."
    return "the body must be a JSON object; send one."


def _unknown(field: str, name: str, known: Iterable[str]) -> str:
    if field in NOT_HONOURED:
        return f"{name} is a field of OpenAI's API that this server cannot honour; {NOT_HONOURED[field]}."
    if field in NOT_OVER_HTTP:
        return f"{name} cannot be given over HTTP; {NOT_OVER_HTTP[field]}."
    if field.startswith(("frame_interpolation", "enable_frame_interpolation")):
        return f"{name} is not available in this version; leave it out."
    near = difflib.get_close_matches(field, list(known), n=1)
    return f"{name:.80} is not known; " + (f"did you mean {near[0]}?" if near else "leave it out.")


def _sentence(name: str, error: Mapping[str, Any]) -> str:
    context = error.get("ctx") or {}
    kind = error["type"]
    if kind == "missing":
        return f"{name} {_WORDS[kind]}."
    shown = f"{name}={error.get('input')!r:.80}"
    if kind in ("greater_than_equal", "less_than_equal", "greater_than"):
        words = {"greater_than_equal": "at least", "less_than_equal": "at most", "greater_than": "more than"}[kind]
        return f"{shown}: must be {words} {context[next(iter(context))]}."
    if kind in ("literal_error", "union_tag_invalid"):
        return f"{shown}: must be {context.get('expected') or context['expected_tags']}."
    if kind in ("too_short", "too_long"):
        words, bound = ("at least", "min_length") if kind == "too_short" else ("at most", "max_length")
        return f"{name} has {context['actual_length']} entries; it must have {words} {context[bound]}."
    if kind == "string_pattern_mismatch" and name in _FORMS:
        return f"{shown}: must be {_FORMS[name]}."
    said = str(error.get("msg", "is not valid")).removeprefix("Value error, ").rstrip(".")
    return f"{shown}: {_WORDS.get(kind) or said[:1].lower() + said[1:]}."
