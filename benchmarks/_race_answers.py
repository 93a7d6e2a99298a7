"""Questions on optimizers that the race table `answers` settles; what is said is checked against it."""

from __future__ import annotations

from benchmarks._race_words import Answer

SAME = ("random, same sharpness", "bottom, same sharpness", "resistant, same sharpness")
SCALAR = "scalar control, same sharpness"
ALL = ("sgd", "adam", "muon")
ANSWERS: tuple[Answer, ...] = (
    Answer(
        "Does a larger k resist longer?",
        ("k = 1", "k = 2", "k = 4", "k = 8", "k = 16", "k = 32"),
        "No: raising k weakens, as statement 3.3 (iii) proves of the floor. From eight directions on the "
        "fast ones reach the target alone, and no optimizer here is slower than without a deformation.",
        lambda t: (
            t.ratio("k = 1", "sgd").low > t.ratio("k = 4", "sgd").high
            and all(t.ratio(f"k = {k}", o).low <= 1 for k in (8, 16, 32) for o in ALL)
        ),
    ),
    Answer(
        "Are the paper's directions the best, and is it the weights that resist?",
        ("k = 1", *SAME, SCALAR),
        "At the sharpness of the top direction, bottom and resistant directions slow gradient descent "
        "longer than top does. One output bias rescaled to that sharpness, nothing inserted, keeps it "
        "from the target within the cap too; Adam is slowed less by it than by any direction.",
        lambda t: (
            min(t.ratio(arm, "sgd").value for arm in SAME[1:]) > t.ratio("k = 1", "sgd").high
            and t.ratio(SCALAR, "sgd").censored
            and t.ratio(SCALAR, "adam").high < min(t.ratio(arm, "adam").low for arm in ("k = 1", *SAME))
        ),
    ),
    Answer(
        "Does the basis matter?",
        ("k = 1", "rotated", "axis"),
        "For gradient descent little; for Adam it decides: rotated and axis deformations hardly slow it, "
        "the symmetric one does. What is exact in floating point (axis) is also what a coordinatewise "
        "method undoes.",
        lambda t: (
            all(t.ratio(b, "adam").high < 0.5 * t.ratio("k = 1", "adam").low for b in ("rotated", "axis"))
            and t.ratio("axis", "sgd").low > 5
        ),
    ),
    Answer(
        "Which layers?",
        ("k = 1", "layer_0/w", "layer_2/w", "layer_*/w"),
        "The middle layer (k = 1 above) slows gradient descent most of the three; deforming all of them "
        "at once adds nothing to it.",
        lambda t: (
            t.ratio("k = 1", "sgd").value > max(t.ratio(f"layer_{i}/w", "sgd").value for i in (0, 2))
            and t.ratio("layer_*/w", "sgd").low < t.ratio("k = 1", "sgd").high
        ),
    ),
    Answer(
        "Under clipping, warmup, decay and minibatch noise?",
        ("k = 1", "clip 1", "clip 0.1", "warmup 50", "decay 0.01", "batch 32"),
        "Each against alpha 1 under the same switch. Clipping takes away part of gradient descent's "
        "slowdown: step sizes that would ruin a run stay usable (notebook 04). The others leave a "
        "slowdown of the same order, and noise is no help to the attacker.",
        lambda t: (
            max(t.ratio(f"clip {c}", "sgd").high for c in (1, 0.1)) < t.ratio("k = 1", "sgd").low
            and t.ratio("batch 32", "sgd").low > 10
        ),
    ),
    Answer(
        "By depth of the target",
        ("k = 1", "bottom, same sharpness"),
        "To 1 nat, above most floors, instead of 0.1. The slowdown is smaller above the floor and far "
        "from gone: the floor bounds what the fast directions can reach, not how soon they do.",
        lambda t: (
            t.ratio("k = 1", "sgd", "1").high < t.ratio("k = 1", "sgd").high
            and t.ratio("k = 1", "sgd", "1").low > 2
        ),
        to="1",
    ),
    Answer(
        "In float32 and bfloat16?",
        ("layered float64", "layered float32", "layered bfloat16"),
        "Trained as released, layer by layer in the stored format, float32 is slowed as float64 is. In "
        "bfloat16 rounding has its own say: the table shows what is left to compare.",
        lambda t: (
            t.ratio("layered float32", "sgd").low < t.ratio("layered float64", "sgd").high
            and t.ratio("layered float64", "sgd").low < t.ratio("layered float32", "sgd").high
        ),
    ),
    Answer(
        "The third-party failure at alpha 1e3, and the paper's own setting",
        ("alpha 1000, k = 1", "alpha 1000, k = 25", "alpha 10000, k = 25"),
        "Reproduced: with the paper's k = 25 the lock helps the attacker even at alpha 1e4, whatever the "
        "optimizer; one direction at the same alpha stops gradient descent within the cap.",
        lambda t: (
            all(
                t.ratio(arm, o).high < 1
                for arm in ("alpha 1000, k = 25", "alpha 10000, k = 25")
                for o in ("sgd", "adam")
            )
            and t.ratio("alpha 1000, k = 1", "sgd").censored
        ),
    ),
)
