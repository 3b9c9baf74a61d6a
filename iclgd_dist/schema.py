"""The columns of the results: one table of names, types, meanings and units. Knows pyarrow types; knows nothing of files or models.

One cell is one row of `CELL`. Its nested lists hold the per-fold, per-(layer, fold) and per-example figures; readers explode them into flat tables.
NULL means undefined or not applicable, never zero; no column holds NaN.
"""

from __future__ import annotations

import pyarrow as pa

# (name, type, meaning). Text between brackets is the unit.
Column = tuple[str, pa.DataType, str]
FOLDS = ("A", "B", "all")
FLOOR_FACTOR = 10.0  # a change counts from more than this many times the noise floor
NUM_NOISE_QUERIES = 32  # zero-shot queries that run a second time, one by one, for the noise floor
# Similarities that have a mean over layers in the row, a mean over queries per (layer, fold), and a mean over layers per example.
SIMILARITIES = (
    "sim_aou",
    "sim_aou_norm",
    "sim_am",
    "sim_am_zs",
    "sim_am_delta",
    "sim_aou_uniform_update",
    "sim_aou_norm_uniform_update",
    "sim_aou_gaussian_state",
    "sim_aou_norm_gaussian_state",
    "sim_aou_prefix",
    "sim_aou_norm_prefix",
    "sim_am_prefix",
    "sim_am_delta_prefix",
    "kendall_tokens",
    "kendall_examples",
    "topk_recall_tokens",
    "topk_recall_examples",
    "kendall_tokens_random",
    "kendall_examples_random",
    "topk_recall_tokens_random",
    "topk_recall_examples_random",
)
# Figures that pool the queries first: no mean over queries, no value per example.
POOLED = ("sim_aou_pooled", "recovered_aou", "sim_aou_pooled_prefix")
NUM_KENDALL_QUERIES = 100  # the first queries, as in the reference, whose attention to the demonstrations is ranked
TOP_TOKENS, TOP_EXAMPLES = 100, 5  # items that topk_recall compares, as in the reference
_MEANING = {
    "sim_aou": "cosine of the change ICL makes to the attention output and the change finetuning makes [-1..1]",
    "sim_aou_norm": "the same on L2-normalised attention outputs; biased upward with the size of the updates [-1..1]",
    "sim_am": "cosine of ICL's and finetuning's attention scores, mean over heads [-1..1]",
    "sim_am_zs": "cosine of ICL's and zero-shot's attention scores, mean over heads; finetuned rows: where sim_am is defined [-1..1]",
    "sim_am_delta": "cosine of the changes of the attention scores, mean over heads; row means over layers >= 1 [-1..1]",
    "sim_aou_uniform_update": "sim_aou with finetuning's change replaced by i.i.d. uniform [0, 1) numbers: a random baseline [-1..1]",
    "sim_aou_norm_uniform_update": "sim_aou_norm with finetuning's change replaced by i.i.d. uniform [0, 1) numbers [-1..1]",
    "sim_aou_gaussian_state": "sim_aou of a finetuned state h_ZS + r, r gaussian, |r| = |u_FT|: a random baseline [-1..1]",
    "sim_aou_norm_gaussian_state": "sim_aou_norm of the same random state: what the size of the update alone scores [-1..1]",
    "sim_aou_prefix": "sim_aou with ICL on exactly the demonstrations trained on so far [-1..1]",
    "sim_aou_norm_prefix": "sim_aou_norm with ICL on exactly the demonstrations trained on so far [-1..1]",
    "sim_am_prefix": "sim_am with ICL on exactly the demonstrations trained on so far [-1..1]",
    "sim_am_delta_prefix": "sim_am_delta with ICL on exactly the demonstrations trained on so far [-1..1]",
    "kendall_tokens": "Kendall's tau-b of ICL's and finetuning's attention to the tokens of the demonstrations; first 100 queries [-1..1]",
    "kendall_examples": "the same of the attention summed per demonstration [-1..1]",
    "topk_recall_tokens": "share of ICL's 100 most attended demonstration tokens among finetuning's; first 100 queries [0..1]",
    "topk_recall_examples": "share of ICL's 5 most attended demonstrations among finetuning's [0..1]",
    "kendall_tokens_random": "kendall_tokens with finetuning's attention replaced by i.i.d. uniform numbers, drawn once per context: a random baseline [-1..1]",
    "kendall_examples_random": "kendall_examples with finetuning's attention replaced by i.i.d. uniform numbers [-1..1]",
    "topk_recall_tokens_random": "topk_recall_tokens with finetuning's attention replaced by i.i.d. uniform numbers [0..1]",
    "topk_recall_examples_random": "topk_recall_examples with finetuning's attention replaced by i.i.d. uniform numbers [0..1]",
    "sim_aou_pooled_prefix": "sim_aou_pooled with ICL on exactly the demonstrations trained on so far [-1..1]",
    "sim_aou_pooled": "sum_q <u_FT, u_ICL> / sqrt(sum_q |u_FT|^2 sum_q |u_ICL|^2) [-1..1]",
    "recovered_aou": "1 - sum_q |u_FT - u_ICL|^2 / sum_q |u_ICL|^2: 1 = ICL's change reproduced, 0 = no update [..1]",
}
f64, i64, text = pa.float64(), pa.int64(), pa.string()

IDENTITY: list[Column] = [
    ("key", text, "sha256 of what defines the cell; also its file name [64 hex digits]"),
    ("kind", text, "zero_shot, icl or finetuned"),
    ("model", text, "short name of the model's source"),
    ("model_source", text, "source as written in the sweep file"),
    ("model_hash", text, "sha256 over weights, tokenizer and config"),
    ("model_notes", pa.list_(text), "what a reader must know of the weights: instruction-tuned, dequantised"),
    ("family", text, "architecture: model_type of its config"),
    ("storage_dtype", text, "dtype the weights are rounded to"),
    ("compute_dtype", text, "dtype of the forward and backward passes"),
    ("tf32", pa.bool_(), "whether float32 matrix products may be rounded to TF32 on a GPU"),
    ("deterministic", pa.bool_(), "whether only GPU kernels are used whose sums have one order"),
    ("init", text, "trained, or how the weights were drawn anew: random, embeddings_norms or norms"),
    ("init_scheme", text, "model or fairseq: which initialisation; NULL for trained"),
    ("init_seed", i64, "seed of the initialisation; NULL for trained"),
    ("task", text, "name of the task"),
    ("num_demonstrations", i64, "demonstrations in the context and in training (k); NULL for zero_shot"),
    ("seed", i64, "seed of the draw of demonstrations; NULL for zero_shot"),
    ("order", i64, "permutation of the draw; 0 = as drawn; NULL for zero_shot"),
    ("num_context_demonstrations", i64, "demonstrations in the context; fewer than k where the protocol leaves out what does not fit; NULL for zero_shot"),
    ("num_queries", i64, "queries evaluated"),
    ("query_seed", i64, "seed of the draw of queries"),
    ("protocol", text, "resolved protocol as JSON, with the sink token it came to"),
    ("train_on", text, "what finetuning saw: true (the demonstrations), random_labels, other_task or shuffled_words; NULL unless finetuned"),
    ("method", text, "vanilla, layer_causal, ...; NULL unless finetuned"),
    ("method_options", text, "what the sweep file says of a method of its own, as JSON; NULL for built-in methods"),
    ("learning_rate", f64, "constant learning rate; NULL unless finetuned"),
    ("step", i64, "number of updates done; NULL unless finetuned"),
    ("origin", text, "grid or search: who asked for the cell first; a cell that a grid asks for too is the grid's"),
    ("sweep", text, "name of the sweep that first computed the cell"),
]

CALIBRATED = ("balanced_accuracy", "nll_label", "ece", "brier")  # figures of answers whose labels' bias is divided out first
# Of one set of queries: all of them in the row, fold A and fold B in `folds`.
ACCURACY: list[Column] = [
    ("n", i64, "queries in the fold"),
    ("accuracy", f64, "share of queries whose prediction is the gold label [0..1]"),
    ("balanced_accuracy", f64, "mean over labels of the share predicted rightly [0..1]"),
    ("nll_label", f64, "mean of -log softmax over the label scores at the gold label [nats]"),
    ("nll_raw", f64, "mean of -(mean log-probability of the gold label's tokens) [nats]"),
    ("majority_baseline", f64, "accuracy of always predicting the most frequent gold label [0..1]"),
    ("majority_share_predicted", f64, "share of the most predicted label [0..1]"),
    ("collapsed", pa.bool_(), "one label predicted for >= 95 % of the queries and > 1.2 x its gold share"),
    ("num_ties", i64, "predictions whose best score was shared; the lowest index won"),
    ("rec2ftp", f64, "100 x N[ZS wrong, FT right, ICL right] / N[ZS wrong, FT right] [%]"),
    ("rec2ftp_base", f64, "100 x N[ZS wrong, ICL right] / N[ZS wrong] [%]"),
    ("num_zs_wrong", i64, "N[ZS wrong]"),
    ("num_zs_wrong_icl_right", i64, "N[ZS wrong, ICL right]"),
    ("num_zs_wrong_ft_right", i64, "N[ZS wrong, FT right]"),
    ("num_zs_wrong_ft_right_icl_right", i64, "N[ZS wrong, FT right, ICL right]"),
    ("jaccard_changed", f64, "predictions changed from ZS: same change in both / (ICL changed + FT changed - same) [0..1]"),
    ("agreement_icl", f64, "share of queries predicted as ICL does [0..1]"),
    ("kappa_icl", f64, "Cohen's kappa with ICL's predictions; NULL if either is constant"),
    ("kl_label_icl", f64, "mean KL(ICL, FT) over label probabilities [nats]"),
    ("ece", f64, "expected calibration error of the labels' probabilities, 10 bins of equal width (Guo et al. 2017) [0..1]"),
    ("ece_mass", f64, "the same with 10 bins of equal number [0..1]"),
    ("brier", f64, "mean squared distance of the labels' probabilities to the gold label's vertex [0..2]"),
    ("entropy", f64, "mean entropy of the labels' probabilities [nats]"),
    *((f"{name}_batch", f64, f"{name} once each label's mean probability over these queries is divided out (arXiv 2309.17249)") for name in CALIBRATED),
]

LAYER: list[Column] = [
    ("layer", i64, "0 = the first decoder layer"),
    ("fold", text, "A, B or all"),
    *((name, f64, f"mean over queries: {_MEANING[name]}") for name in SIMILARITIES),
    *((f"{name}_n", i64, f"queries for which {name} is defined") for name in SIMILARITIES),
    *((name, f64, _MEANING[name]) for name in POOLED),
    ("update_ratio", f64, "mean_q |u_FT| / mean_q |u_ICL|"),
    ("relative_update", f64, "mean_q |u_FT| / mean_q |h_ZS|"),
    ("relative_update_icl", f64, "mean_q |u_ICL| / mean_q |h_ZS|"),
    ("update_norm", f64, "mean_q |u_FT|, L2"),
    ("update_norm_icl", f64, "mean_q |u_ICL|, L2"),
    ("delta_norm_k", f64, "Frobenius norm of what training added to W_K and its bias (fold all)"),
    ("delta_norm_v", f64, "Frobenius norm of what training added to W_V and its bias (fold all)"),
    ("delta_norm_q", f64, "the same of W_Q; NULL where it does not learn"),
    ("delta_norm_o", f64, "the same of the attention's output projection; NULL where it does not learn"),
    ("delta_norm_mlp", f64, "the same of the MLP; NULL where it does not learn"),
    ("gradient_norm", f64, "L2 norm of the gradient of what learns in the layer, in the last update (fold all)"),
    ("loss", f64, "the layer's own loss before the last update; layer-causal methods only (fold all) [nats per token]"),
    ("noise_floor", f64, "largest |h - h'| of two zero-shot captures at different packings; at least the rounding of h in the compute dtype (fold all)"),
    ("noise_floor_scores", pa.list_(f64), "the same of the attention scores, per query head (fold all)"),
]

EXAMPLE: list[Column] = [
    ("query", text, "id of the query: hash of its text and label"),
    ("fold", text, "A or B"),
    ("gold", i64, "index of the gold label"),
    ("prediction", i64, "index of the predicted label"),
    ("label_scores", pa.list_(f64), "mean log-probability of each label's tokens [nats]"),
    ("nll_label", f64, "-log softmax over the label scores at the gold label [nats]"),
    *((name, f64, f"mean over layers: {_MEANING[name]}") for name in SIMILARITIES),
    ("update_norm", f64, "mean over layers of |u_FT|"),
]

OUTCOME: list[Column] = [
    ("status", text, "done or diverged"),
    ("diverged_step", i64, "first step whose loss, gradient or capture was not finite"),
    ("last_finite_loss", f64, "training loss before the last finite update [nats per token]"),
    *ACCURACY,
    ("prediction_counts", pa.list_(i64), "how often each label was predicted, in label order"),
    ("label_words", pa.list_(text), "the labels' words, in label order"),
    *((name, f64, f"mean over layers: {_MEANING[name]}") for name in (*SIMILARITIES, *POOLED)),
    *(
        (f"{name}_{part}", f64, f"{name}: {meaning}")
        for name in (*SIMILARITIES, *POOLED)
        for part, meaning in (
            ("median", "median over layers"),
            ("lower", "mean over the lower third of the layers"),
            ("middle", "... middle third"),
            ("upper", "... upper third"),
        )
    ),
    (
        "update_ratio",
        f64,
        "R: geometric mean of the layers' update_ratio, over the layers that finetuning changes by more than 10 x the noise floor; 0 if it changes none",
    ),
    ("update_norm", f64, "mean over layers of mean_q |u_FT|"),
    ("delta_norm", f64, "Frobenius norm of everything training added"),
    ("gradient_norm", f64, "L2 norm of the whole gradient of the last update"),
    ("loss", f64, "training loss of the last update's demonstrations, before that update; sum over layers for layer-causal methods [nats per token]"),
    ("num_queries_left_out", i64, "queries skipped in the draw because they do not fit the model's context"),
]

PROVENANCE: list[Column] = [
    ("model_revision", text, "hub commit the files came from; NULL for local files"),
    ("versions", text, "versions of the libraries as JSON"),
    ("git_commit", text, "commit of this project's code; NULL where unknown"),
    ("device", text, "device and thread count"),
    ("host", text, "name of the machine"),
    ("lanes", i64, "learning rates that rode in the same pass"),
    ("wall_seconds", f64, "the cell's equal share of the time since its block's previous commit [s]"),
    ("peak_gib", f64, "peak memory of the process: resident, or of the GPU [GiB]"),
    ("prompts", pa.list_(text), "prompts of the queries, in the order of `examples`; zero_shot only, NULL where [capture] texts = false"),
    ("demonstrations", pa.list_(text), "what stands in the context, in its order: prompt and label word; icl only, NULL where [capture] texts = false"),
    ("capture_file", text, "kept capture, relative to the store; NULL where none was kept"),
    ("capture_sha256", text, "sha256 of that file [64 hex digits]"),
    ("created_at", pa.timestamp("us", tz="UTC"), "when the cell was committed"),
]


def _struct(columns: list[Column]) -> pa.DataType:
    return pa.struct([pa.field(name, kind) for name, kind, _ in columns])


FOLD: list[Column] = [("fold", text, "A or B"), *ACCURACY]
# Figures that compare a cell with something else, or that a sweep file adds. Readers see them as tables: `controls`, `pairs`, `metrics`, `extras`.
MEASURE: list[Column] = [
    ("kind", text, "control, pair, metric or extra"),
    ("name", text, "the control (other_task with its task: other_task:trec); the key of the other cell of a pair; version of a metric; group of an extra"),
    ("metric", text, "what was measured"),
    ("layer", i64, "0 = the first decoder layer; NULL where the figure is of the whole model"),
    ("fold", text, "A, B or all"),
    ("n", i64, "queries for which the figure is defined; NULL for a figure of weights"),
    ("mean", f64, "mean over them, or the one figure that they have together"),
    ("sd", f64, "standard deviation over them; NULL for fewer than 2"),
]
# Of kind `extra`: group (`name`) -> metric -> meaning. Source of each in the docstrings of calibration, outputs, spectra and geometry.
EXTRAS = {
    "calibration": {
        f"{name}": f"{name} once the labels' mean probabilities after prompts without content are divided out; zero_shot and icl too" for name in CALIBRATED
    },
    "outputs": {
        "top10_overlap": "share of ICL's 10 most likely next tokens among finetuning's [0..1]",
        "top10_cosine": "cosine of the two probabilities over the tokens that both have among their 10 [0..1]",
        "kl_output": "KL(ICL, FT) of the next-token distributions [nats]",
        "tv_output": "total variation of the next-token distributions [0..1]",
    },
    "weights": {
        "stable_rank_<part>": "sum / largest of the squared singular values of what training added to a projection of the layer; `<part>`: q, k, v, o, mlp.<module>",
        "effective_rank_<part>": "exp of the entropy of the shares of the singular values",
    },
    "change": {
        "stable_rank": "of the change of the attention output over the queries, not centred; NULL where it is at most 10 x the noise floor; icl too",
        "effective_rank": "the same, exp of the entropy of the shares of the singular values; icl too",
        "participation_ratio": "the same, (sum of eigenvalues)^2 / sum of their squares; icl too",
        "icl_share_in_ft": "share of ICL's change inside the 8 directions in which finetuning's is largest [0..1]",
        "ft_share_in_icl": "share of finetuning's change inside the 8 directions in which ICL's is largest [0..1]",
        "principal_cosine": "mean cosine of the principal angles between the two subspaces [0..1]",
        "cka": "linear centred kernel alignment of the two changes [0..1]",
    },
    "geometry": {
        "learnability": "share of queries whose k-means cluster (10) most of their 5 nearest neighbours have, of the attention output; all kinds [0..1]",
        "intrinsic_dimension": "TwoNN, of the attention output; all kinds",
    },
    "order:<order>": {
        metric: f"{metric} with ICL in this order of the seed's demonstrations, mean over layers of the mean over queries; from kept captures [-1..1]"
        for metric in ("sim_aou", "sim_am_delta")
    },
    "supervised_icl": {f"{name}": f"{name} of the finetuned model with the demonstrations in the prompt" for name in CALIBRATED},
}
NESTED: list[Column] = [
    ("folds", pa.list_(_struct(FOLD)), "accuracy and its kin of fold A and of fold B"),
    ("layers", pa.list_(_struct(LAYER)), "figures per layer and fold"),
    ("examples", pa.list_(_struct(EXAMPLE)), "figures per query, in the order drawn"),
    ("measures", pa.list_(_struct(MEASURE)), "controls, pairs, metrics of one's own, and extras"),
]
CELL = pa.schema([pa.field(name, kind, metadata={"meaning": meaning}) for name, kind, meaning in [*IDENTITY, *OUTCOME, *PROVENANCE, *NESTED]])

# An attempt: one execution of a block by an actor, whatever came of it. Never a result.
ATTEMPT: list[Column] = [
    ("block", text, "name of the block"),
    (
        "outcome",
        text,
        "done, oom, storage, metric (one of the user's own failed; the cells are there), failed, stopped (by a scheduler), interrupted or lost (its actor died)",
    ),
    ("reason", text, "what went wrong, one line; NULL when done"),
    ("traceback", text, "NULL when done"),
    ("host", text, "name of the machine"),
    ("actor", text, "id of the actor that ran it"),
    ("run", text, "id of the run that scheduled it"),
    ("num_model_loads", i64, "models this attempt had to load (0 when the actor already held it)"),
    ("num_baselines", i64, "baselines computed: zero-shot and ICL are one each"),
    ("num_lanes", i64, "most learning rates of a method that ran at once, after halving where memory ran out"),
    ("num_training_steps", i64, "updates done, summed over methods and learning rates"),
    ("num_cells", i64, "cells committed"),
    ("wall_seconds", f64, "time of the attempt [s]"),
    ("peak_gib", f64, "peak memory of the process [GiB]"),
    ("cpus", i64, "CPUs of the actor; NULL where unknown"),
    ("gpus", i64, "GPUs of the actor; NULL where unknown"),
    ("gflops", f64, "float32 matrix-product rate of the actor, measured when it started [GFLOP/s]"),
    ("created_at", text, "UTC, ISO 8601"),
]
