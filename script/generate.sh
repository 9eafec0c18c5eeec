#!/usr/bin/env bash
# Answer the test file. Change the values here, or set them for one call:
#   is_global_model=false client_id=3 bash script/generate.sh [CUDA devices, such as 0 or 0,1]
set -euo pipefail

exp_name=${exp_name-homo-1B}
base_model=${base_model-meta-llama/Llama-3.2-1B}
model_dir=${model_dir-./models}
is_global_model=${is_global_model-true}
client_id=${client_id-0} # whose adapter answers when is_global_model=false
is_base_model=${is_base_model-false}
communication_rounds=${communication_rounds-20}
test_file_path=${test_file_path-./data/dataset1/dolly_test_200.jsonl}
prediction_dir=${prediction_dir-./predictions}

batch_size=${batch_size-} # empty: the token budget alone decides
preset=${preset-greedy} # greedy, reference
max_new_tokens=${max_new_tokens-128}
seed=${seed-309}
device=${device-auto}
overwrite=${overwrite-false}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ -n ${1-} ]]; then export CUDA_VISIBLE_DEVICES=$1; fi
if [[ -z ${PYTHON-} ]]; then PYTHON=python3; [[ ! -x .venv/bin/python ]] || PYTHON=.venv/bin/python; fi

"$PYTHON" generate.py \
  --exp_name "$exp_name" --base_model "$base_model" --model_dir "$model_dir" \
  --is_global_model "$is_global_model" --client_id "$client_id" --is_base_model "$is_base_model" \
  --communication_rounds "$communication_rounds" --test_file_path "$test_file_path" \
  --prediction_dir "$prediction_dir" --batch_size "$batch_size" --preset "$preset" \
  --max_new_tokens "$max_new_tokens" --seed "$seed" --device "$device" --overwrite "$overwrite"
