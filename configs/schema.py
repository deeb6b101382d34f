"""Every setting of every job: type, default and meaning. One dataclass per section, `Config` is the whole.

Names are those of the reference implementation, so that its YAML files load. The text under a field is its documentation:
`--help` prints it (configs/help.py). Cross-field checks are in configs/checks.py, null defaults that follow another setting
are filled in by configs/load.py. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class Experiment:
    """The run as a whole."""

    project: str | None = None
    """The run directory (required): config.yaml, metrics.jsonl, rollouts/, ckpt/, state/ and results/ are written there."""
    start_from_scratch: bool = True
    """True: an unfinished run of the same settings goes on, any other existing run directory is refused. False: always goes on."""
    total_step: int = 100
    """RL steps of the run."""
    save_every: int = 20
    """Keep a named checkpoint (ckpt/step-N) every so many steps."""
    eval_every: int = 10
    """Evaluate every so many RL steps."""
    save_state_every: int = 1
    """Write what resuming needs every so many steps."""
    train_value_every: int = 1
    """Update the value model every so many RL steps."""
    current_epoch: int = 1
    """Step to start from when going on. The run's own state knows it, so a value above 1 is only compared with the state."""
    deepspeed_file: str | None = None
    """File in accelerate_configs/ without .yaml; null: no DeepSpeed (one process, or DDP)."""
    check_memory: bool = True
    """Training on GPUs: do not start what by the estimate of its memory cannot fit (docs/scaling.md). False: start all the same."""
    num_node: int = 1
    """Machines."""
    node_index: int = 0
    """Which machine this is, from 0; the launcher sets it."""
    num_processes: int | None = None
    """Processes per machine; null: one per GPU, or one without GPUs."""
    plugins: list[str] = field(default_factory=list)
    """Paths of .py files that every process imports at its start: they register families, methods, rewards, objectives."""


@dataclass
class Model:
    """The models of the run."""

    pretrained_model: str | None = None
    """Directory in Hugging Face format or hub name (required). Evaluation files may call it `model`."""
    prepare_config: str | None = None
    """The config whose job makes pretrained_model. RL runs it first where that does not exist yet and the config is one of
    finetuning; else it is named there. No use where it makes another model."""
    model_base: str | None = None
    """The family, a name in models/registry.py: sdar, trado, ... (required). Evaluation files may have it at the top level."""
    block_size: int | None = None
    """Block models: the block size that the run's checkpoints say, where it is to become another than the one that config.json says
    now; sampling may be at either. Null: it stays. See docs/methods.md, block-size enlargement."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of weights and activations. auto: bfloat16 where training.mixed_precision is bf16, else float32."""
    optimized_name: str = "optimized"
    """Name under ckpt/ of the newest weights."""
    optimized_value_name: str = "optimized_value"
    """Name under ckpt/ of the newest value model."""
    value_base_model: str | None = None
    """Given: use a value model, initialised from this checkpoint with a zero head."""
    value_shared: bool = False
    """Use a value head on the policy's own trunk instead of a second model."""
    value_offload: Literal["auto", "always", "never"] = "auto"
    """Move the value model and its optimizer to the host during the rollout. auto: as training.offload_optimizer."""
    process_reward_model: str | None = None
    """Given: a language model that grades solutions chunk by chunk. See reward.judge, where it may run as a server instead."""
    vq_model_path: str | None = None
    """MMaDA: the image tokenizer. No use yet."""
    image_resolution: int = 512
    """MMaDA: side of an image, pixels. No use yet."""


@dataclass
class Dataset:
    """What is read. A name is data/NAME.json; a path to json, jsonl or parquet works too."""

    train_dataset: str | None = None
    """Tasks of RL (required there)."""
    eval_dataset: str | None = None
    """Tasks of evaluation (required by eval.py)."""
    optimization_data: str | None = None
    """Data of supervised finetuning (required there)."""
    validation_data: str | None = None
    """SFT: held-out data of the same form, for the validation loss. See training.validation_share for a part of the data itself."""
    data_type: str = "math"
    """How answers are scored, a name in reward/registry.py: math, exact, ... (judge: by reward.judge alone)."""
    use_chat_template: bool = True
    """Prompts by the chat template of the checkpoint's tokenizer, where it has one; False: by the family's fixed form, as the
    reference does. Its form for LLaDA is another: that of MMaDA (data/prompts.py, llama3-mmada)."""
    image_root: str | None = None
    """Folder that image paths start from. No use yet."""
    add_think_prompt: bool = False
    """Multimodal: the prompt asks for thinking first. No use yet."""


@dataclass
class System:
    """The environment of every process, and how a job gets to its other machines (docs/multinode.md)."""

    HTTP_PROXY: str | None = None
    """Proxy for downloads, for http and https: an environment variable, set at the start of every process. Null: as it is."""
    HF_HOME: str | None = None
    """Cache of the Hugging Face libraries, set likewise."""
    launcher: Literal["auto", "pdsh", "ssh", "none"] = "auto"
    """How machine 0 starts the job on the others, where MLP_WORKER_<i>_HOST name them. None: not at all, the same command is
    started on every machine. Auto: pdsh where it is installed, else ssh. Under Slurm, torchrun, Kubernetes it is none."""
    ssh_user: str | None = None
    """User on the other machines; null: as ssh has it."""
    ssh_port: int | None = None
    """Port of ssh there; null: as ssh has it."""
    ssh_options: list[str] = field(default_factory=list)
    """Further options of ssh, as behind its -o: StrictHostKeyChecking=no, IdentityFile=/path."""
    pass_environment: list[str] = field(default_factory=list)
    """Environment variables of machine 0 that the processes of the others get too, beside proxies, caches, HF_HUB_*, NCCL_* and
    the like: names, or beginnings of names that end in *."""
    start_timeout_seconds: float = 600.0
    """How long machine 0 waits for the others before the start."""
    silence_timeout_seconds: float = 30.0
    """A machine that nothing has been heard of for so long is lost: the job ends everywhere, and can be started again."""


@dataclass
class Decoding:
    """How responses are decoded: shared by `rollout` and `evaluation`."""

    temperature: float = 1.0
    """Sampling temperature; 0: greedy."""
    top_p: float = 1.0
    """Keep the most probable tokens that hold this share of the probability."""
    top_k: int = 0
    """Keep the k most probable tokens; 0: all."""
    remasking_strategy: str = "low_confidence_static"
    """Which masked tokens to reveal, a name in sample/registry.py. Low_confidence_static: a fixed number per forward.
    Low_confidence_dynamic: all above dynamic_threshold, at least the fixed number (full attention: at least one). Sequential:
    from left to right. Entropy_bounded: the most certain ones, within entropy_bound."""
    dynamic_threshold: float = 0.9
    """Score above which low_confidence_dynamic reveals a token: from 0 to 1; target neg_entropy: 0 or less, -0.5 for all positions
    of less than half a nat."""
    entropy_bound: float = 0.1
    """Nats: entropy_bounded reveals the largest set with sum of entropies - the largest of them <= this, at least one."""
    target: str = "confidence"
    """What ranks the masked positions: confidence, margin_confidence, neg_entropy, random (sample/registry.py)."""
    confidence: Literal["raw", "filtered"] = "raw"
    """Probabilities before top-k and top-p, or after them (as the reference does)."""
    block_size: int = 4
    """Tokens of a block; a block model was trained for one."""
    denoising_steps_per_block: int | None = None
    """Block models, static: forwards per block; null: block_size, so one token per forward."""
    max_token: int = 2000
    """Longest response, tokens. Files for full-attention models call it max_gen_length: both names mean this."""
    steps: int | None = None
    """Full attention, static: forwards of the whole response; null: max_token."""
    use_cache: bool = True
    """Full attention, where cache is null: prefix. False: none."""
    cache: Literal["none", "prefix", "dual"] | None = None
    """Full attention: keys and values that are kept from a block's first forward, over the whole canvas, for its other forwards:
    none (exact: every forward is over the whole canvas), of what is before the block (prefix), or of what is behind it too (dual:
    forwards are over the block alone). Both are approximate. Null: as use_cache says."""
    further_horizon: int | None = None
    """Full attention: tokens behind the block that its forwards with a cache compute beside it. What is behind these is not seen at
    all (prefix; null: they reach to the end), or is seen as it was (dual; null: 0)."""
    stop_early: bool = False
    """Full attention: skip whole blocks behind the first stop token."""
    max_active: int = 256
    """Sequences in flight per process, at most (fewer where the memory is short); RL evaluates with rollout.max_active."""
    alg_temp: float = 0.0
    """Full attention: draw the positions to reveal in proportion to exp(score / alg_temp), scores as of target; 0: the best."""
    pad_target_penalty: float = 1.0
    """Full attention: the score of a position is divided by this where the token drawn for it is the pad token."""
    start_with_think: bool = False
    """Begin the answer with a think tag."""
    stop_token_list: list[str] = field(default_factory=list)
    """Tokens that end a response, besides the family's own."""
    deterministic: bool = False
    """Several processes: deal the prompts out by their index, not to whoever is free. A sequence draws the same noise either way;
    with this it is sampled beside the same others in every run, so that sums are rounded alike too: bit for bit on CPU."""

    @property
    def cache_kind(self) -> str:
        """Full attention: `cache`, null resolved."""
        return self.cache or ("prefix" if self.use_cache else "none")

    @property
    def max_response_length(self) -> int:
        """Tokens, before rounding up to the end of a block."""
        return self.max_token


@dataclass
class RewardModel:
    """The language model that grades chunks of a solution (model.process_reward_model)."""

    reward_chunk_length: int = 200
    """Tokens of a graded chunk."""
    k_sample: int = 3
    """Judgements per chunk."""
    max_model_len: int = 15000
    """The judge's longest input and output, tokens."""
    max_generation_token: int = 10000
    """The judge's longest output, tokens."""
    temperature: float = 0.6
    """The judge's sampling temperature."""


@dataclass
class Rollout(Decoding):
    """Sampling of the responses that RL learns from."""

    engine: Literal["auto", "torch", "triton"] = "auto"
    """Of every job, evaluations included: plain torch, or Triton kernels and CUDA graphs. auto: triton on a CUDA GPU where the
    family's attention kind has such an engine, else torch."""
    num_task_per_step: int = 128
    """Tasks per RL step."""
    num_response_per_task: int = 16
    """Responses per task: the group within which advantages are taken."""
    resample: bool = False
    """Replace dropped groups by further tasks until num_task_per_step are kept."""
    resample_max_rounds: int = 8
    """Give up replacing after so many further rounds of sampling."""
    reward_model: RewardModel = field(default_factory=RewardModel)


@dataclass
class Execute:
    """Running of generated programs."""

    num_chunk: int = 128
    """Programs tested at a time, at most: never more than the cores that a process of the job has."""
    memory_mb: int = 1024
    """What a program may use with all of its children, MiB."""


@dataclass
class Judge:
    """The language model that grades responses: an endpoint (base_url), or model.process_reward_model run here. It adds to the
    reward of dataset.data_type. Lengths and number of judgements: rollout.reward_model."""

    base_url: str | None = None
    """Address of an OpenAI-compatible endpoint, http://host:8000/v1. Null and model.process_reward_model given: run that here."""
    model: str | None = None
    """The endpoint's name of the model; null: model.process_reward_model, or the only one that it serves."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the endpoint's key."""
    granularity: Literal["chunk", "response"] = "chunk"
    """chunk: every rollout.reward_model.reward_chunk_length tokens (process reward). response: the whole at once (RLHF)."""
    aggregate: Literal["mean", "agreement"] = "mean"
    """Of the k_sample judgements: their mean; or their mean where all are on the same side of neutral, else neutral."""
    weight: float = 1.0
    """Of the judge's score, from -1 to 1, in the reward."""
    outcome_weight: float = 1.0
    """Of the reward of dataset.data_type, where there is a judge. 0: it only counts what is right."""
    per_step: bool = True
    """Token rewards are scores / number of denoising steps, so that returns do not grow with it. False: bare scores."""
    rubric: str | None = None
    """What to grade by, in words; null: correctness and progress (chunk), or correctness and helpfulness (response)."""
    show_answer: bool = False
    """Show the expected answer to the judge."""
    concurrency: int = 32
    """Requests in flight, all processes together. Judge run here: responses graded at a time, per process."""
    timeout_seconds: float = 600.0
    """Time limit of one request."""
    retry_seconds: float = 600.0
    """How long to go on trying while the endpoint answers nothing at all; then the run ends, and can go on later."""
    nonsense_retries: int = 2
    """How often to ask again where a reply holds no verdict; then it counts as no judgement."""


@dataclass
class Reward:
    """From responses to rewards."""

    function: str | None = None
    """A reward of your own, path/to/file.py:name or a registered name; null: the one of dataset.data_type."""
    overlong_margin: int | None = 5
    """Responses of max_token minus this or more count as wrong; null: no such rule."""
    overlong_penalty_tokens: int = 0
    """Soft punishment of long responses in RL: over the last so many tokens before max_token the reward falls linearly, by 1 at
    max_token. 0: none."""
    num_workers: int = 2
    """Processes that check answers."""
    timeout_seconds: float = 5.0
    """Time limit for one answer; beyond it, it is wrong."""
    keep_solve_rate: list[float] = field(default_factory=lambda: [0.2, 0.8])
    """Groups whose share of right responses is outside these bounds (inclusive) are dropped, also those of equal rewards."""
    code_score: Literal["share", "all"] = "share"
    """Programs: the share of the tests that pass, or 1 where all pass and else 0. Share: groups are kept by reward alone, not
    by keep_solve_rate."""
    answer_must_in_box: bool = False
    """Multimodal: only a boxed answer counts. No use yet."""
    strict_len_check: bool = False
    """Multimodal: over-long answers score 0. No use yet."""
    judge: Judge = field(default_factory=Judge)


@dataclass
class LoRA:
    """Train a low-rank adapter beside frozen weights; checkpoints hold the adapter, in peft's format (docs/lora.md)."""

    rank: int | None = None
    """Of the adapter; null or 0: none, all weights train (an adapter that pretrained_model names is merged first)."""
    alpha: float | None = None
    """The adapter counts alpha/rank times; null: 2 * rank."""
    target_modules: list[str] = field(default_factory=lambda: ["all-linear"])
    """Layers that get one, by their published names (q_proj, ...; LLaDA: attn_out, ff_proj, ...), or all-linear."""
    dropout: float = 0.0
    """SFT: share of the adapter's inputs that are dropped. (RL trains the very distribution that it samples.)"""
    save_merged: bool = False
    """Write the merged weights too, a whole checkpoint, as ckpt/NAME-merged."""


@dataclass
class Training:
    """The update."""

    method: str | None = None
    """What is masked and predicted, a file of train/methods/; null: TraceRL for RL, semi-ar for SFT."""
    objective: str | None = None
    """What is minimised; null: the method's own objective."""
    loss_weighting: Literal["reference", "step", "response", "token", "constant"] = "reference"
    """Weights of the trained tokens. reference: as its rows amount to (full attention: mean over rows of the mean over the row's
    tokens, the KL of a row summed); step: 1/(tokens of the denoising step), per response;
    response: mean over responses of the mean over tokens; token: mean over tokens; constant: 1/(responses * max_gen_length)."""
    shrink: int = 1
    """Denoising steps that are joined to one."""
    max_rows_per_response: int | None = None
    """Of a response's rows (its denoising steps or its masks; block models: the k-th step of every block at once) train so many,
    drawn anew for every update, each weighted by rows/drawn: loss and gradient are on average those of all rows. Null: all. Meant
    for full attention, where every row is a forward of its own. A value model still reads all rows once, without a gradient."""
    block_size: int | None = None
    """Tokens of a training block; null: rollout.block_size."""
    post_num: int | None = None
    """Padded data: pad tokens of a row that are trained; null: all."""
    lower_p: float = 0.1
    """Random masks: smallest ratio of masked tokens."""
    upper_p: float = 0.9
    """Random masks: largest ratio of masked tokens."""
    mask_ratio: Literal["per_block", "per_token", "per_response"] = "per_block"
    """Random masks: what has a ratio of its own, drawn evenly between lower_p and upper_p. Full attention: a response is one block,
    except for semi-ar."""
    mask_times_per_sample: int = 1
    """Random masks per response."""
    complementary_mask: bool = False
    """Semi-ar and random_masking: every mask comes with its complement, so that the two train each token once."""
    max_gen_length: int | None = None
    """Responses are cut behind so many tokens; null: rollout.max_token. Full attention, SFT: the canvas that shorter ones are
    filled up to, as sampling would."""
    max_prompt_len: int = 784
    """Longer prompts are dropped, and counted in the log; tokens."""
    eps: float = 0.2
    """Ratios of probabilities are clipped to 1 - eps .. 1 + eps."""
    eps_high: float | None = None
    """Upper clip 1 + eps_high; null: eps."""
    beta: float = 0.0
    """Weight of the KL term."""
    kl_to: Literal["old", "reference"] = "old"
    """KL to the policy that sampled, or to the frozen start."""
    use_kl_estimator_k3: bool = True
    """KL as exp(d) - d - 1 (k3); False: as the difference of log-probabilities (k1)."""
    advantage: str = "zscore"
    """Reward against its group, a name in reward/advantages.py. Zscore: (r - mean)/std; mean_only: r - mean; rloo: r - mean of the
    others. A value model takes its place."""
    gam: float = 1.0
    """Value model: discount per denoising step."""
    lam: float = 1.0
    """Value model: lambda of generalised advantage estimation."""
    value_loss_weight: float = 0.5
    """model.value_shared: weight of the value loss beside the policy's."""
    old_logprobs: Literal["auto", "trainer", "engine", "current"] = "auto"
    """Denominator of the ratio. trainer: a forward before the first update; engine: as sampled; current: of the update itself
    (the ratio is 1); auto: trainer where several updates use one batch, else current, which is then the same."""
    importance_cap: float | None = None
    """Truncated importance weights min(p_trainer/p_engine, cap); null: none."""
    num_updates_per_step: int | None = None
    """Optimizer steps per RL step; null: by num_train_epochs, batch_size_lm, gradient_accumulation_steps, as the reference."""
    num_train_epochs: int = 1
    """Passes over the rollouts of an RL step; SFT: over the data."""
    batch_size_lm: int = 1
    """Rows per micro-batch and process, as the reference counts them: used for num_updates_per_step only."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per optimizer step, as the reference counts them: used for num_updates_per_step only."""
    max_tokens_per_microbatch: int = 16384
    """Packed tokens of one forward: what decides memory. Never changes the result."""
    shared_prompts: Literal["auto", "always", "never"] = "auto"
    """Whether responses of one prompt share its clean tokens in a pack. Never changes the result. auto: on a GPU; the dense masks
    of a CPU hold all pairs of a group."""
    head_chunk: int = 2048
    """Rows of logits computed at a time."""
    attention_backend: Literal["auto", "dense", "flex"] = "auto"
    """auto: FlexAttention on a GPU, dense on CPU."""
    fused_kernels: bool = True
    """On a GPU: norms, rotary positions, SwiGLU and the vocabulary's part of the update in Triton kernels, and bf16 canvases by
    variable-length attention. false: plain torch."""
    offload_optimizer: Literal["auto", "always", "never"] = "auto"
    """Move optimizer states, gradients and a frozen reference (under ZeRO-3 the trainer's weights too) to the host while the engine
    samples, and back, bit for bit. auto: where the free GPU memory does not hold the keys and values of all sequences that may be
    in flight (of block models: of 128), and the host has place."""
    reduce_in_float32: bool = False
    """Sum bfloat16 gradients over the processes in float32: twice the traffic, and more memory under ZeRO-2 and 3, for sums without
    the rounding of about 1e-3 that docs/exactness.md measures. One process rounds nothing either way."""
    mixed_precision: Literal["no", "bf16"] = "bf16"
    """bf16: bfloat16 weights with float32 masters in the optimizer. no: float32."""
    enable_tf32: bool = True
    """TF32 products for float32 on NVIDIA GPUs."""
    gradient_checkpointing_enable: Literal[True, False, "auto"] = "auto"
    """Recompute activations layer by layer in the backward: memory against time, never the result. true: of every layer. auto: of
    as few as leave the update within the GPU's memory by the estimate of it (docs/scaling.md); on a CPU of none."""
    seed: int = 10086
    """Of everything random."""
    max_grad_norm: float | None = 1.0
    """Gradients are scaled down to this norm; null: not."""
    max_steps: int | None = None
    """SFT: optimizer steps; null: num_train_epochs over the data."""
    batch_size: int = 64
    """SFT: documents per optimizer step, over all processes, each with all of its masks. Takes the place of batch_size_lm and
    gradient_accumulation_steps, which count rows."""
    eval_every: int = 100
    """SFT: every so many optimizer steps the validation loss, and the solve rate where there is dataset.eval_dataset."""
    validation_share: float = 0.0
    """SFT: share of the data that is held out for the validation loss (chosen by training.seed); 0: none."""
    stop_at_solve_rate: float | None = None
    """SFT: end once this share of dataset.eval_dataset is solved; null: never."""
    loss_weight_by_ratio: bool = False
    """Semi-ar and random_masking: weight the loss of a masked block by 1/(its share of masked tokens), as the likelihood bound has
    it. Of loss_weighting it needs one that does not divide by the masked tokens as well: constant, or reference of block models."""
    lora: LoRA = field(default_factory=LoRA)


@dataclass
class OptimizerParams:
    """Settings of the optimizer."""

    learning_rate: float | None = None
    """Peak learning rate; null: policy_learning_rate, or 1e-6 without it."""
    policy_learning_rate: float | None = None
    """Of the policy, where there is a value model too; null: learning_rate. This is the one that the loop reads."""
    value_learning_rate: float | None = None
    """Of the value model; null: learning_rate."""
    beta1: float = 0.9
    """AdamW: decay of the mean of gradients."""
    beta2: float = 0.999
    """AdamW: decay of the mean of squares."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    epsilon: float = 1e-8
    """AdamW: added to the root of the mean of squares."""


@dataclass
class Optimizer:
    """The optimizer of policy and value model."""

    name: Literal["adamw", "sgd"] = "adamw"
    """sgd is plain: no momentum."""
    params: OptimizerParams = field(default_factory=OptimizerParams)


@dataclass
class SchedulerParams:
    """Settings of the schedule."""

    learning_rate: float | None = None
    """As in optimizer.params: may be given again, not differently; null: that one."""
    warmup_steps: int = 0
    """Optimizer steps of linear warm-up."""
    min_lr_scale: float = 1.0
    """Last learning rate as a share of the peak (1: constant behind the warm-up)."""


@dataclass
class LrScheduler:
    """The learning rate over the whole run."""

    scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay from 1 to min_lr_scale."""
    params: SchedulerParams = field(default_factory=SchedulerParams)


@dataclass
class Evaluation(Decoding):
    """Decoding of evaluations. A setting that is not given is as in `rollout`. In files for eval.py the two sections are one.

    The lists run one evaluation each, first with first and so on; a single value goes with all."""

    if_eval: bool = True
    """False: RL does not evaluate."""
    num_response_per_task: int = 1
    """Responses per task: accuracy is their mean, pass@k is over them."""
    remasking_strategy: list[str] = field(default_factory=lambda: ["low_confidence_static"])
    """One or several; see rollout.remasking_strategy."""
    top_k: list[int] = field(default_factory=lambda: [0])
    """One or several; see rollout.top_k."""
    block_size: list[int] = field(default_factory=lambda: [4])
    """One or several; see rollout.block_size."""

    def variants(self) -> list[Decoding]:
        """The evaluations to run: plain `Decoding`s with every list and null resolved."""
        number = max(len(self.remasking_strategy), len(self.top_k), len(self.block_size))
        shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(Decoding)}
        variants = []
        for n in range(number):
            one = {name: shared[name][n if len(shared[name]) > 1 else 0] for name in ["remasking_strategy", "top_k", "block_size"]}
            steps = shared["denoising_steps_per_block"] or one["block_size"]
            variants.append(Decoding(**{**shared, **one, "denoising_steps_per_block": steps}))
        return variants


@dataclass
class Wandb:
    """Logging to Weights & Biases."""

    enabled: bool = False
    """Log there too (wandb has to be installed)."""
    entity: str | None = None
    """The team's or user's name."""
    run_id: str | None = None
    """Of the run to go on with; null: found in the run's state, or a new one."""
    resume: str | None = "auto"
    """As wandb.init takes it: auto, allow, must, never."""


@dataclass
class Logging:
    """What else to log; metrics.jsonl is always written."""

    tensorboard: bool = False
    """Write event files to the run directory too."""
    gap_responses: int = 4
    """Responses of an RL step whose log-probs are computed once more along the steps of their sampling, for `gap/*` in the metrics,
    where the update itself trains other slices (shrink, random masks, another block size); 0: none. Where it trains the sampled
    ones, all of its tokens are compared."""
    gradient_norms_every: int | None = None
    """Every so many optimizer steps the norm of the gradient of every tensor of the checkpoint is written to gradient_norms.jsonl;
    null: never."""


@dataclass
class Config:
    """All settings of a job, resolved."""

    experiment: Experiment = field(default_factory=Experiment)
    model: Model = field(default_factory=Model)
    dataset: Dataset = field(default_factory=Dataset)
    system: System = field(default_factory=System)
    rollout: Rollout = field(default_factory=Rollout)
    execute: Execute = field(default_factory=Execute)
    reward: Reward = field(default_factory=Reward)
    training: Training = field(default_factory=Training)
    optimizer: Optimizer = field(default_factory=Optimizer)
    lr_scheduler: LrScheduler = field(default_factory=LrScheduler)
    evaluation: Evaluation = field(default_factory=Evaluation)
    wandb: Wandb = field(default_factory=Wandb)
    logging: Logging = field(default_factory=Logging)


def get(config: Config, key: str) -> Any:
    """The value of "section.key"."""
    return functools.reduce(getattr, key.split("."), config)
