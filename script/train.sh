#!/usr/bin/env bash
# Train one federation. Change the values here, or set them for one call:
#   federation_mode=seq exp_name=seq-1B bash script/train.sh [CUDA devices, such as 0 or 0,1]
set -euo pipefail

exp_name=${exp_name-homo-1B}
base_model=${base_model-meta-llama/Llama-3.2-1B}
data_path=${data_path-./data/dataset1}
model_dir=${model_dir-./models}
federation_mode=${federation_mode-homo} # homo, seq, none, pooled
client_selection_strategy=${client_selection_strategy-random} # random, all, round_robin
client_selection_frac=${client_selection_frac-1}
num_communication_rounds=${num_communication_rounds-20}
num_clients=${num_clients-8}

local_batch_size=${local_batch_size-128}
local_micro_batch_size=${local_micro_batch_size-8} # empty: the token budget alone decides
local_num_epochs=${local_num_epochs-3}
local_learning_rate=${local_learning_rate-3e-4}
lr_schedule=${lr_schedule-constant} # constant, linear, cosine, linear_per_round
optimizer_state=${optimizer_state-reset} # reset, keep
warmup_steps=${warmup_steps-0}
adam_beta1=${adam_beta1-0.9}
adam_beta2=${adam_beta2-0.999}
adam_eps=${adam_eps-1e-8}
weight_decay=${weight_decay-0}
max_grad_norm=${max_grad_norm-1.0}
local_val_set_size=${local_val_set_size-0}
val_data_path=${val_data_path-}

lora_r=${lora_r-4}
lora_alpha=${lora_alpha-16}
lora_dropout=${lora_dropout-0.05}
lora_target_modules=${lora_target_modules-q_proj,v_proj}

prompt_template=${prompt_template-alpaca} # alpaca, chat
cutoff_len=${cutoff_len-512}
train_on_inputs=${train_on_inputs-false}
group_by_length=${group_by_length-false}
seed=${seed-42}
device=${device-auto}
overwrite=${overwrite-false}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ -n ${1-} ]]; then export CUDA_VISIBLE_DEVICES=$1; fi
if [[ -z ${PYTHON-} ]]; then PYTHON=python3; [[ ! -x .venv/bin/python ]] || PYTHON=.venv/bin/python; fi

"$PYTHON" train.py \
  --exp_name "$exp_name" --base_model "$base_model" --data_path "$data_path" --model_dir "$model_dir" \
  --federation_mode "$federation_mode" --client_selection_strategy "$client_selection_strategy" \
  --client_selection_frac "$client_selection_frac" --num_communication_rounds "$num_communication_rounds" \
  --num_clients "$num_clients" --local_batch_size "$local_batch_size" \
  --local_micro_batch_size "$local_micro_batch_size" --local_num_epochs "$local_num_epochs" \
  --local_learning_rate "$local_learning_rate" --lr_schedule "$lr_schedule" \
  --optimizer_state "$optimizer_state" --warmup_steps "$warmup_steps" --adam_beta1 "$adam_beta1" \
  --adam_beta2 "$adam_beta2" --adam_eps "$adam_eps" --weight_decay "$weight_decay" \
  --max_grad_norm "$max_grad_norm" --local_val_set_size "$local_val_set_size" \
  --val_data_path "$val_data_path" --lora_r "$lora_r" --lora_alpha "$lora_alpha" \
  --lora_dropout "$lora_dropout" --lora_target_modules "$lora_target_modules" \
  --prompt_template "$prompt_template" --cutoff_len "$cutoff_len" --train_on_inputs "$train_on_inputs" \
  --group_by_length "$group_by_length" --seed "$seed" --device "$device" --overwrite "$overwrite"
