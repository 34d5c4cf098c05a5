"""llama.cpp's own HTTP server (llama-server, in a wheel of the Python package index) for pio-lsp --bench --against http://127.0.0.1:8089.

    pip install '.[bench]' && python models/smollm2_135m/benchmarks/serve_llama_cpp.py

Serves the default model, fetching it if it is not here, or a .gguf file; one slot, as one editor needs it, until it is interrupted.
"""

from __future__ import annotations

import argparse
import signal
from pathlib import Path

import xllamacpp

from inference_pio.engine import hub


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m", help="a model's name or a .gguf file")
    parser.add_argument("--port", type=int, default=8089)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=8192)
    options = parser.parse_args()
    path: Path = hub.locate(options.model, lambda done, total: None).path
    if path.suffix != ".gguf":
        raise SystemExit(f"llama.cpp reads .gguf files, and {path} is none")
    params = xllamacpp.CommonParams()
    params.model.path, params.port, params.n_ctx, params.n_parallel, params.endpoint_slots = str(path), options.port, options.context, 1, True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
    server = xllamacpp.Server(params)
    print(f"{path.name} on {server.listening_address}: {xllamacpp.get_system_info()}", flush=True)
    signal.sigwait({signal.SIGINT, signal.SIGTERM})


if __name__ == "__main__":
    main()
