# The live view of the traces in a folder, from a checkout. Not built yet: its steps were run in a virtual
# environment, without a compiler, with Python 3.11.
#
#     docker build -f tools/view.Dockerfile -t grutrace-view .
#     docker run --rm --init --network host -v "$PWD/runs:/runs:ro" grutrace-view /runs --port 5006
#
# The page listens to 127.0.0.1 only, so the container needs the network of its host (on Linux). It prints the
# address, with a random token. For a torch without CUDA, which takes 3 GB less, give pip's options for it, from
# PyTorch's page "Start Locally": --build-arg TORCH="torch --index-url ADDRESS".
FROM python:3.12-slim

ARG TORCH=torch
WORKDIR /grutrace
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE constraints.txt ./
# Unquoted: words of their own.
# hadolint ignore=SC2086
RUN pip install --no-cache-dir -c constraints.txt $TORCH
COPY grutrace grutrace
RUN pip install --no-cache-dir -c constraints.txt ".[cli,view]"

USER nobody
WORKDIR /runs
ENTRYPOINT ["grutrace", "view", "--no-browser"]
CMD ["/runs"]
