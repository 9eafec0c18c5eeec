#!/usr/bin/env bash
# Score answers with ROUGE. Change the values here, or set them for one call:
#   is_global_model=false bash script/evaluate_rouge.sh
set -euo pipefail

exp_name=${exp_name-homo-1B}
is_global_model=${is_global_model-true} # false: client_id, or every client when that is empty
client_id=${client_id-}
num_clients=${num_clients-8}
is_base_model=${is_base_model-false}
communication_rounds=${communication_rounds-20}
target_file=${target_file-./data/dataset1/dolly_test_200.jsonl}
target_key=${target_key-output}
prediction_dir=${prediction_dir-./predictions}
prediction_key=${prediction_key-answer}
evaluation_dir=${evaluation_dir-./evaluations_rouge}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ -z ${PYTHON-} ]]; then PYTHON=python3; [[ ! -x .venv/bin/python ]] || PYTHON=.venv/bin/python; fi

clients=${client_id:-0}
if [[ $is_global_model == [Ff]alse && $is_base_model == [Ff]alse && -z $client_id ]]; then
  clients=$(seq 0 $((num_clients - 1)))
fi
for client_id in $clients; do
  "$PYTHON" evaluate_rouge.py \
    --exp_name "$exp_name" --is_global_model "$is_global_model" --client_id "$client_id" \
    --is_base_model "$is_base_model" --communication_rounds "$communication_rounds" \
    --target_file "$target_file" --target_key "$target_key" --prediction_dir "$prediction_dir" \
    --prediction_key "$prediction_key" --evaluation_dir "$evaluation_dir"
done
