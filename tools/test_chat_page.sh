#!/bin/sh
# Run the tests of the chat's page in an environment of its own, which sees the packages of .venv: gradio pins an older
# Pillow. Chromium comes from the system. FOLDER says where the environment lies.
set -e
cd "$(dirname "$0")/.."
folder=${FOLDER:-build/chat}
python=${PYTHON:-.venv/bin/python}
if [ ! -x "$folder/bin/python" ]; then
    site=$($python -c "import sysconfig; print(sysconfig.get_path('purelib'))")
    $python -m venv "$folder"
    echo "$site" > "$("$folder/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")/main.pth"
    "$folder/bin/python" -m pip install --quiet gradio playwright
fi
PYTHONPATH=src "$folder/bin/python" -m pytest -m thorough -rs -p no:cacheprovider tests/stages/test_chat_page.py
