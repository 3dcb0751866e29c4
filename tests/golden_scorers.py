"""The text-conditioned methods' entries beside those of tests/golden.py."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch.nn.functional import normalize

from tests.golden import Golden, Values, build, clip_sizes, frame_heads, gradients, text_of_temporal, without_towers
from training import losses, models
from training.model_config import (
    MeanPoolConfig,
    ScorerConfig,
    TS2NetConfig,
    TS2NetScorerConfig,
    XClipConfig,
    XPoolConfig,
)
from training.models.clip import clip_from_config
from training.models.text_conditioned import Scorer
from training.models.token_shift import shift_patches
from training.models.ts2net import TS2Net, TS2NetScorer
from training.models.two_tower import TextOut, VideoOut
from training.models.xclip import XClip
from training.models.xpool import XPool

S = TypeVar("S", bound=Scorer)
ROUNDING = 2e-6  # of a difference of two float32 scores within (-1, 1)


def scorer_of(golden: Golden, config: ScorerConfig, clip: torch.nn.Module, kind: type[S]) -> S:
    """The registered scorer with the file's weights."""
    sizes = golden.sizes
    scorer = models.SCORERS[config.name](config, clip, sizes["frames"], sizes.get("words", 0))
    assert isinstance(scorer, kind)
    scorer = scorer.to(golden.dtype)
    scorer.load_state_dict({k: golden.weights[k] for k in scorer.state_dict()})
    return scorer


def xpool(golden: Golden) -> Values:
    """The pooling block over given features; with the published head, and with several on the same weights."""
    sizes, inputs = golden.sizes, golden.inputs
    scale, found = inputs["logit_scale"].detach().exp(), {}
    clip = clip_from_config(clip_sizes(without_towers(sizes), {}, {}))
    for heads, end in ((sizes["heads"], ""), (sizes["heads_alt"], f"_heads{sizes['heads_alt']}")):
        scorer = scorer_of(golden, XPoolConfig(heads=heads, dropout=0.0), clip, XPool)
        text_TD, frames_BFD = inputs["text_features"], inputs["frame_features"]
        cached_BKD = scorer.cached(frames_BFD)
        similarity = scorer.pairs(text_TD[:, None], cached_BKD)
        found |= {f"out.similarity{end}": similarity, f"out.pooled{end}": scorer.pooled(text_TD, cached_BKD)}
        if not end:
            (inputs["cotangent"] * similarity).sum().backward()
            square = min(similarity.shape)
            of_pairs = text_TD[:square, None], frames_BFD[:square], scale, [square]
            found |= {"out.loss_square": losses.contrastive(*of_pairs, scorer), **gradients(scorer, inputs)}
    return found


def xclip(golden: Golden) -> Values:
    """With the video vector of either head; padding counts, as official."""
    inputs, found = golden.inputs, {}
    config = XClipConfig(temperature=golden.sizes["temperature"], padded_words=True)
    for head, (model, names) in frame_heads(golden).items():
        scorer = scorer_of(golden, config, model.clip, XClip)
        leaves = {
            f"{k}_features": inputs[f"{k}_features"].detach().requires_grad_() for k in ("sentence", "word", "frame")
        }
        sentence_TD, words_TLD, frames_BFD = leaves.values()
        in_context_BFD = model.in_context(frames_BFD, inputs["video_mask"])
        mean_BD = model.pooled(in_context_BFD, inputs["video_mask"])
        query_TQD = scorer.query(TextOut(normalize(sentence_TD, dim=-1), words_TLD, inputs["text_mask"].bool()))
        key_BKD = scorer.key(VideoOut(normalize(mean_BD, dim=-1), in_context_BFD, frames_BFD))
        scale = model.clip.logit_scale.exp()
        similarity = scale * scorer(query_TQD, key_BKD)
        (inputs["cotangent"] * similarity).sum().backward()
        square = min(similarity.shape)
        values = {
            "out.similarity": similarity,
            "out.video_mean": mean_BD,
            "out.loss_square": losses.contrastive(query_TQD[:square], key_BKD[:square], scale, [square], scorer),
        }
        if head == "seqTransf":
            terms = scorer.terms(query_TQD, scorer.cached(key_BKD))._asdict()
            found |= {**values, **{f"out.{k}": v for k, v in terms.items()}}
            found |= {**gradients(model, leaves, names), **gradients(scorer)}
        else:
            found |= {key.replace(".", f".{head}.", 1): value for key, value in values.items()}
    return found


def ts2net(golden: Golden) -> Values:
    """With the recorded noise, without noise, and with padded frames both ways; no text tower is in the file."""
    sizes, inputs = golden.sizes, golden.inputs
    tower = {"layers": sizes["vit_layers"], "heads": sizes["vit_heads"]}
    given = golden._replace(sizes={**sizes, **text_of_temporal(sizes, sizes["embed"]), **tower})
    names = {f"predictor.{k.partition('.score_predictor.')[2]}": k for k in golden.weights if "score_predictor" in k}
    names |= {f"temporal.{k}": k for k in golden.weights if k.startswith(("transformerClip.", "frame_position_"))}
    model, other = (build(given, ts2net_config(sizes, tiled), names, is_partial=True) for tiled in (False, True))
    assert isinstance(model, TS2Net) and isinstance(other, TS2Net)
    scorer = scorer_of(golden, TS2NetScorerConfig(), model.clip, TS2NetScorer)
    query_TQD, scale = inputs["text_features"][:, None], model.clip.logit_scale.exp()
    tokens_BFLD = model.projected(inputs["video"])
    scores_BFL = model.predictor(tokens_BFLD)
    found = {"out.tokens": tokens_BFLD, "out.scores": scores_BFL}
    for end, noise_NSP in (("hard.", None), ("", inputs["noise"].detach())):
        indicator_BFkP = model.indicator(scores_BFL, noise_NSP)
        selected_BFnD = model.selected(tokens_BFLD, indicator_BFkP)
        frames_BFD = model.in_time(selected_BFnD)
        found |= {f"out.{end}indicator": indicator_BFkP, f"out.{end}selected": selected_BFnD}
        found |= {f"out.{end}similarity": scale * scorer(query_TQD, frames_BFD), f"out.{end}frame_outputs": frames_BFD}
    found["out.hard.similarity"] = scale * scorer(query_TQD, model.eval().frame_features(inputs["video"]))
    for end, masking in (("masked", other), ("maskfixed", model)):
        padded_BFD = masking.in_time(found["out.hard.selected"], inputs["video_mask"])
        scores_TV = scorer.pairs(query_TQD, scorer.cached(padded_BFD), masking.frame_mask(inputs["video_mask"]))
        found |= {f"out.hard.{end}.similarity": scale * scores_TV, f"out.hard.{end}.frame_outputs": padded_BFD}
    (inputs["cotangent"] * found["out.similarity"]).sum().backward()
    square = min(inputs["cotangent"].shape)
    of_pairs = query_TQD[:square].detach(), frames_BFD[:square].detach(), scale.detach(), [square]
    found |= {"out.loss_square": losses.contrastive(*of_pairs, scorer), **gradients(model, inputs, names)}
    return {**found, **shifts(given)}


def ts2net_config(sizes: Mapping[str, Any], tiled_mask: bool) -> TS2NetConfig:
    return TS2NetConfig(
        backbone="from file",
        num_frames=sizes["frames"],
        div=sizes["n_div"],
        last_layers=len(sizes["shift_layers"]),
        temporal={"layers": sizes["layers"]},  # type: ignore[arg-type]
        num_selected=sizes["topk"],
        sigma=sizes["sigma"],
        tiled_mask=tiled_mask,
    )


def shifts(golden: Golden) -> Values:
    """The shift alone, and the tower without it."""
    towers = {k: v for k, v in golden.weights.items() if k.startswith("visual.") or k == "logit_scale"}
    plain = MeanPoolConfig(backbone="from file", num_frames=golden.sizes["frames"])
    unshifted = build(golden._replace(weights=towers), plain, is_partial=True)
    alone = {k.replace("shift_x", "out.shift_y"): v for k, v in golden.inputs.items() if k.startswith("shift_x")}
    alone = {k: shift_patches(v, golden.sizes["n_div"]) for k, v in alone.items()}
    return {**alone, "out.noshift.cls": unshifted.frame_features(golden.inputs["video"])}


def undecided(golden: Golden, found: Values, references: Values) -> set[str]:
    """What TS2-Net's selection decides, if rounding changed it: only where two scores at its edge are the same."""
    if "out.indicator" not in references:
        return set()
    scores_BFSP = references["out.scores"][:, :, None, 1:]
    noise_BFSP = golden.inputs["noise"].detach().unflatten(0, scores_BFSP.shape[:2])
    changed = False
    for end, drawn_BFSP in (("hard.", scores_BFSP), ("", scores_BFSP + golden.sizes["sigma"] * noise_BFSP)):
        best_BFSk = drawn_BFSP.topk(golden.sizes["topk"] + 1).values
        is_even_BF = (best_BFSk[..., -2] - best_BFSk[..., -1]).amin(-1) < ROUNDING
        gap_BFkP = found[f"out.{end}indicator"].detach() - references[f"out.{end}indicator"]
        differs_BF = gap_BFkP.abs().amax((-2, -1)) > ROUNDING
        if (differs_BF & ~is_even_BF).any():
            return set()
        changed = changed or bool(differs_BF.any())
    before = ("out.tokens", "out.scores", "out.noshift.", "out.shift_")
    return {key for key in references if not key.startswith(before)} if changed else set()


TEXT_CONDITIONED: dict[str, Callable[[Golden], Values]] = {"xpool": xpool, "xclip": xclip, "ts2net": ts2net}
