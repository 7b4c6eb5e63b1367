"""What answers about drafts look like, for the schema at /openapi.json."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from denoised.server.kept_drafts import Draft
from denoised.server.replies import ImageData


class DraftReply(BaseModel):
    """A picture that was put aside after `step` of `total_steps`. Times are Unix seconds."""

    id: str
    object: Literal["image.draft"]
    created_at: int
    expires_at: int = Field(description="when it is forgotten, if not before to make room")
    model: str
    prompt: str
    seed: int
    step: int
    total_steps: int


class PicturedDraft(DraftReply):
    """A draft that was just made, with what the model had in mind."""

    size: str
    output_format: Literal["png", "jpeg", "webp"]
    pictured_step: int = Field(
        description="what `pictures` show: `step`, or more where steps are faster than previews"
    )
    pictures: list[ImageData]


class DraftsReply(BaseModel):
    object: Literal["list"]
    data: list[PicturedDraft]


class DraftList(BaseModel):
    object: Literal["list"]
    data: list[DraftReply]


class DraftDeleted(BaseModel):
    id: str
    object: Literal["image.draft.deleted"]
    deleted: Literal[True]


def shown(draft: Draft) -> dict[str, Any]:
    """A draft without its picture."""
    same = {name: getattr(draft, name) for name in ("id", "model", "prompt", "seed", "step", "total_steps")}
    times = {"created_at": int(draft.created_at), "expires_at": int(draft.expires_at)}
    return {"object": "image.draft", **same, **times}
