"""The browser's part of qmove, in Debian's Chromium, in the real frontend packages of ComfyUI.

    make test PYTEST_ARGS=tests/browser                          against the small server in `small_comfyui`
    COMFYUI_DIR=~/ComfyUI COMFYUI_PYTHON=~/venv/bin/python make test PYTEST_ARGS=tests/browser     against a real ComfyUI
    make test PYTEST_ARGS="tests/browser --update-screenshots"   also writes the pictures that the
    README shows

Each frontend version gets one server process and one browser. All tests run on the newest version;
those marked `every_frontend` on the older ones too. Screenshots and the log of the server lie in
`tests/browser/artefacts`.
"""
