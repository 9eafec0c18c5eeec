#!/usr/bin/env bash
# Let a judge compare our answers (proposed_file) with a baseline's. Change the values here, or set them for one call:
#   exp_name=none-1B is_base_model=false is_global_model=false bash script/evaluate_llm.sh
set -euo pipefail

exp_name=${exp_name-homo-1B} # of the baseline; the results go under this name
is_global_model=${is_global_model-true} # false: client_id, or every client when that is empty
client_id=${client_id-}
num_clients=${num_clients-8}
is_base_model=${is_base_model-true} # the baseline is the untrained model
communication_rounds=${communication_rounds-20}
proposed_file=${proposed_file-homo-1B/20/global_output.jsonl}
prediction_dir=${prediction_dir-./predictions}
prediction_key=${prediction_key-answer}
target_file=${target_file-} # empty: the judge sees no reference answers
target_key=${target_key-output}
evaluation_dir=${evaluation_dir-./evaluations_llm}

gpt_model=${gpt_model-gpt-4.1}
base_url=${base_url-https://api.openai.com/v1}
api_key=${api_key-} # empty: OPENAI_API_KEY or api_key_file
api_key_file=${api_key_file-}
batch_size=${batch_size-20} # samples per request
max_calls=${max_calls-} # empty: no limit

cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ -n $api_key ]]; then export api_key; fi # never an argument: arguments are visible to everyone here
if [[ -z ${PYTHON-} ]]; then PYTHON=python3; [[ ! -x .venv/bin/python ]] || PYTHON=.venv/bin/python; fi

clients=${client_id:-0}
if [[ $is_global_model == [Ff]alse && $is_base_model == [Ff]alse && -z $client_id ]]; then
  clients=$(seq 0 $((num_clients - 1)))
fi
for client_id in $clients; do
  "$PYTHON" evaluate_llm.py \
    --exp_name "$exp_name" --is_global_model "$is_global_model" --client_id "$client_id" \
    --is_base_model "$is_base_model" --communication_rounds "$communication_rounds" \
    --proposed_file "$proposed_file" --prediction_dir "$prediction_dir" --prediction_key "$prediction_key" \
    --target_file "$target_file" --target_key "$target_key" --evaluation_dir "$evaluation_dir" \
    --gpt_model "$gpt_model" --base_url "$base_url" --api_key_file "$api_key_file" --batch_size "$batch_size" \
    --max_calls "$max_calls"
done
