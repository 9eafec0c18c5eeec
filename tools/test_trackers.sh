#!/bin/sh
# Run the tests of each experiment tracker in an environment of its own: their pins clash with ours and with each other.
# Each environment sees the packages of .venv, so torch is not installed again. FOLDER says where they lie.
set -e
cd "$(dirname "$0")/.."
folder=${FOLDER:-build/trackers}
python=${PYTHON:-.venv/bin/python}
site=$($python -c "import sysconfig; print(sysconfig.get_path('purelib'))")
for name in ${TRACKERS:-tensorboard wandb mlflow trackio}; do
    if [ ! -x "$folder/$name/bin/python" ]; then
        $python -m venv "$folder/$name"
        echo "$site" > "$("$folder/$name/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")/main.pth"
        "$folder/$name/bin/python" -m pip install --quiet "$name"
    fi
    PYTHONPATH=src "$folder/$name/bin/python" -m pytest -m thorough -rs -p no:cacheprovider tests/tracking -k "$name"
done
