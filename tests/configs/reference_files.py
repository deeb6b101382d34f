"""YAML files in the manner of the reference implementation: between them every key that its files hold."""

RL_BLOCK = """
wandb:
  entity: null
  run_id: null
  resume: 'auto'

experiment:
    project: "rl_trado"
    function: "train"
    start_from_scratch: True
    total_step: 150
    save_every: 5
    eval_every: 5
    current_epoch: 1
    deepspeed_file: "1_node_8_gpus_deepspeed_zero3"
    num_node: 1
    node_index: 0

model:
    pretrained_model: "/models/TraDo-4B-Instruct"
    model_base: "trado"
    optimized_name: "optimized"
    process_reward_chunk_size: 64

dataset:
    train_dataset: "MATH_train"
    optimization_data: "rl_data"
    eval_dataset: "MATH500"
    data_type: "math"

rollout:
    tensor_parallel_size: 1
    max_active: 256
    num_task_per_step: 128
    num_response_per_task: 32
    temperature: 1.0
    top_p: 1.0
    top_k: 0
    max_token: 2000
    block_size: 4
    denoising_steps_per_block: 4
    remasking_strategy: "low_confidence_dynamic"
    dynamic_threshold: 0.9
    start_with_think: False
    stop_token_list: ['<|im_end|>']

execute:
    num_chunk: 128

training:
    gradient_checkpointing_enable: True
    gradient_accumulation_steps: 8
    batch_size_lm: 1
    mixed_precision: bf16
    enable_tf32: True
    seed: 10086
    num_train_epochs: 1
    max_grad_norm: 1.0
    method: "TraceRL"
    lower_p: 0.1
    upper_p: 0.9
    mask_times_per_sample: 2
    shrink: 1
    block_size: 4
    post_num: 0
    max_gen_length: 2000
    max_prompt_len: 512
    eps: 0.2
    beta: 0.01
    use_kl_estimator_k3: True

optimizer:
    name: adamw
    params:
        learning_rate: 1e-6
        scale_lr: False
        beta1: 0.9
        beta2: 0.999
        weight_decay: 0.0
        epsilon: 1e-8

lr_scheduler:
    scheduler: "cosine"
    params:
        learning_rate: ${optimizer.params.learning_rate}
        warmup_steps: 0
        min_lr_scale: 1.0

evaluation:
    if_eval: True
    tensor_parallel_size: 1
    max_active: 256
    num_response_per_task: 3
    temperature: 1.0
    top_p: 1.0
    top_k: [1, 0]
    max_token: 2000
    block_size: 4
    denoising_steps_per_block: 4
    remasking_strategy: ["low_confidence_static", "low_confidence_dynamic"]
    dynamic_threshold: 0.95
    start_with_think: False
"""

RL_FULL_WITH_VALUE = """
wandb:
  entity: null
  resume: 'auto'

experiment:
    project: "multinode_rl_llada_with_value"
    function: "train"
    start_from_scratch: False
    total_step: 80
    save_every: 10
    eval_every: 10
    train_value_every: 1
    current_epoch: 1
    deepspeed_file: "2_node_8_gpus_deepspeed_zero3"
    num_node: 2
    node_index: 0

system:
    HTTP_PROXY: "http://proxy:3128"
    HF_HOME: "/cache/hf"
    env_name: "dllm"
    envs_dir: "/envs"
    base_dir: "/code"
    reward_env_name: "reward"

model:
    pretrained_model: "/models/LLaDA-8B-Instruct"
    model_base: "llada"
    value_base_model: "/models/LLaDA-8B-Instruct"
    process_reward_model: "/models/Qwen2.5-32B"
    optimized_name: "optimized"
    optimized_value_name: "optimized_value"
    vq_model_path: "/models/magvitv2"
    image_resolution: 512

dataset:
    train_dataset: "PrimeIntellect"
    optimization_data: "rl_data"
    eval_dataset: "LiveBench"
    data_type: "code"
    image_root: "/images"
    add_think_prompt: True

rollout:
    num_task_per_step: 32
    num_response_per_task: 8
    temperature: 0.9
    top_p: 0.95
    top_k: 40
    steps: 256
    max_gen_length: 256
    block_size: 32
    batch_size: 2
    use_cache: True
    further_horizon: 128
    alg_temp: 0
    pad_target_penalty: 1.0
    target: "confidence"
    remasking_strategy: "low_confidence_static"
    dynamic_threshold: 0.95
    reward_model:
        reward_chunk_length: 200
        k_sample: 3
        max_model_len: 15000
        max_generation_token: 10000
        temperature: 0.6

reward:
    answer_must_in_box: True
    strict_len_check: False

execute:
    num_chunk: 128

training:
    method: "coupled"
    mask_times_per_sample: 8
    shrink: 8
    post_num: null
    max_gen_length: 256
    max_prompt_len: 784
    eps: 0.2
    beta: 0.0
    use_kl_estimator_k3: False
    gam: 1.0
    lam: 1.0

optimizer:
    name: adamw
    params:
        policy_learning_rate: 1e-6
        value_learning_rate: 5e-6

lr_scheduler:
    scheduler: "cosine"
    params:
        learning_rate: ${optimizer.params.policy_learning_rate}
        warmup_steps: 0
        min_lr_scale: 1.0

evaluation:
    num_response_per_task: 1
    temperature: 0.1
    steps: 256
    max_gen_length: 256
    block_size: [32, 64]
    batch_size: 2
    use_cache: True
    further_horizon: 128
    target: "confidence"
    remasking_strategy: ["low_confidence_static", "low_confidence_dynamic"]
"""

EVAL = """
experiment:
    project: "trado_eval"
    num_node: 1
    node_index: 0

model: "/models/TraDo-8B-Instruct"
model_base: "trado"
answer_must_in_box: True
vq_model_path: "/models/magvitv2"
image_resolution: 256

dataset:
    eval_dataset: "MATH500"
    data_type: "math"

rollout:
    tensor_parallel_size: 1
    max_active: 2
    num_response_per_task: 3
    temperature: 0.5
    max_token: 10000
    block_size: 4
    denoising_steps_per_block: 4
    top_p: 0.9
    top_k: 50
    remasking_strategy: ["low_confidence_static", "low_confidence_dynamic"]
    dynamic_threshold: 0.9
    start_with_think: True
    output_unmasking_history: True

execute:
    num_chunk: 128
"""

SFT = """
wandb:
  entity: null
  resume: 'auto'

experiment:
    project: "sft_trado"
    num_node: 1

model:
    pretrained_model: "/models/TraDo-4B-Instruct"
    model_base: "trado"
    optimized_name: "optimized"

dataset:
    optimization_data: "demon_openr1math"

training:
    method: "semi-ar"
    gradient_accumulation_steps: 1
    batch_size_lm: 4
    num_train_epochs: 3
    mixed_precision: bf16
    block_size: 8
    post_num: 1
    lower_p: 0.1
    upper_p: 0.9
    mask_times_per_sample: 35
    max_gen_length: 2000
    max_prompt_len: 512

optimizer:
    name: adamw
    params:
        learning_rate: 1e-5

lr_scheduler:
    scheduler: "cosine"
    params:
        learning_rate: ${optimizer.params.learning_rate}
        warmup_steps: 100
        min_lr_scale: 0.1
"""

RL_DREAM = """
wandb:
  entity: null
  resume: 'auto'

experiment:
    project: "rl_dream"
    function: "train"
    start_from_scratch: True
    total_step: 60
    save_every: 10
    eval_every: 10
    current_epoch: 1
    deepspeed_file: "1_node_8_gpus_deepspeed_zero3"
    num_node: 1
    node_index: 0

model:
    pretrained_model: "/models/Dream-v0-Instruct-7B"
    model_base: "dream"
    optimized_name: "optimized"

dataset:
    train_dataset: "MATH_train"
    optimization_data: "rl_data"
    data_type: "math"

rollout:
    num_task_per_step: 64
    num_response_per_task: 16
    temperature: 1.0
    steps: 512
    max_gen_length: 512
    block_size: 4
    batch_size: 1
    use_cache: True
    further_horizon: 32
    alg_temp: 0
    pad_target_penalty: 1.2
    target: "margin_confidence"
    top_p: 1.0
    remasking_strategy: "low_confidence_dynamic"
    dynamic_threshold: 0.95

execute:
    num_chunk: 128

training:
    gradient_checkpointing_enable: True
    gradient_accumulation_steps: 4
    batch_size_lm: 1
    mixed_precision: bf16
    enable_tf32: True
    seed: 10086
    num_train_epochs: 1
    max_grad_norm: 1.0
    method: "TraceRL"
    lower_p: 0.1
    upper_p: 0.9
    mask_times_per_sample: 8
    shrink: 16
    post_num: 4
    max_gen_length: 512
    max_prompt_len: 784
    eps: 0.2
    beta: 0.01
    use_kl_estimator_k3: True

optimizer:
    name: adamw
    params:
        learning_rate: 1e-6
        scale_lr: False
        beta1: 0.9
        beta2: 0.999
        weight_decay: 0.0
        epsilon: 1e-8

lr_scheduler:
    scheduler: "cosine"
    params:
        learning_rate: ${optimizer.params.learning_rate}
        warmup_steps: 0
        min_lr_scale: 1.0

evaluation:
    if_eval: True
    eval_dataset: "MATH500"
    data_type: "math"
    num_response_per_task: 1
    temperature: 0.1
    steps: 512
    max_gen_length: 512
    block_size: [4, 32]
    batch_size: 1
    use_cache: True
    further_horizon: 128
    target: "confidence"
    remasking_strategy: ["low_confidence_dynamic", "low_confidence_static"]
    dynamic_threshold: 0.9
"""

EVAL_MMADA = """
experiment:
    project: "mmada_eval"
    num_node: 1
    node_index: 0

model: "/models/MMaDA-8B-MixCoT"
model_base: "mmada"

dataset:
    eval_dataset: "GSM8K"
    data_type: "math"

rollout:
    num_response_per_task: 1
    temperature: 0.1
    steps: 128
    max_gen_length: 256
    block_size: [32, 64]
    batch_size: 2
    use_cache: False
    further_horizon: 128
    target: "neg_entropy"
    top_p: 0.95
    top_k: 40
    remasking_strategy: "low_confidence_static"
    dynamic_threshold: 0.9
    output_unmasking_history: True

execute:
    num_chunk: 128
"""

SFT_DREAM = """
wandb:
  entity: null
  resume: 'auto'

experiment:
    project: "sft_dream"
    num_node: 1

model:
    pretrained_model: "/models/Dream-v0-Instruct-7B"
    optimized_name: "optimized"

dataset:
    optimization_data: "demon_openr1math"

training:
    method: "semi-ar"
    gradient_accumulation_steps: 1
    batch_size_lm: 4
    num_train_epochs: 3
    mixed_precision: bf16
    block_size: 32
    shrink: 48
    post_num: 4
    lower_p: 0.1
    upper_p: 0.9
    mask_times_per_sample: 35
    max_gen_length: 1600
    max_prompt_len: 512

optimizer:
    name: adamw
    params:
        learning_rate: 1e-5

lr_scheduler:
    scheduler: "cosine"
    params:
        learning_rate: ${optimizer.params.learning_rate}
        warmup_steps: 100
        min_lr_scale: 0.1
"""

EVERY_KEY = """
experiment: project function start_from_scratch total_step save_every eval_every train_value_every current_epoch
    deepspeed_file num_node node_index
model: pretrained_model model_base optimized_name optimized_value_name value_base_model process_reward_model
    process_reward_chunk_size vq_model_path image_resolution
dataset: train_dataset eval_dataset optimization_data data_type image_root add_think_prompt
system: HTTP_PROXY HF_HOME env_name envs_dir base_dir reward_env_name
rollout: num_task_per_step num_response_per_task temperature top_p top_k remasking_strategy dynamic_threshold target
    block_size denoising_steps_per_block max_token max_gen_length steps use_cache further_horizon batch_size max_active
    tensor_parallel_size alg_temp pad_target_penalty start_with_think stop_token_list output_unmasking_history
    reward_model.reward_chunk_length reward_model.k_sample reward_model.max_model_len reward_model.max_generation_token
    reward_model.temperature
execute: num_chunk
reward: answer_must_in_box strict_len_check
training: method lower_p upper_p mask_times_per_sample shrink block_size post_num max_gen_length max_prompt_len eps beta
    use_kl_estimator_k3 gam lam gradient_accumulation_steps batch_size_lm num_train_epochs mixed_precision enable_tf32
    seed max_grad_norm gradient_checkpointing_enable
optimizer: name params.learning_rate params.policy_learning_rate params.value_learning_rate params.beta1 params.beta2
    params.weight_decay params.epsilon params.scale_lr
lr_scheduler: scheduler params.learning_rate params.warmup_steps params.min_lr_scale
evaluation: if_eval eval_dataset data_type
    num_response_per_task temperature top_p top_k remasking_strategy dynamic_threshold target block_size
    denoising_steps_per_block max_token max_gen_length steps use_cache further_horizon batch_size max_active
    tensor_parallel_size start_with_think
wandb: entity resume run_id
top: model model_base vq_model_path image_resolution answer_must_in_box
"""
"""The settings of the reference, by section."""


def every_key() -> set[str]:
    keys, section = set(), ""
    for word in EVERY_KEY.split():
        if word.endswith(":"):
            section = "" if word == "top:" else word[:-1] + "."
        else:
            keys.add(section + word)
    return keys
