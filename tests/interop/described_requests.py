"""Has Schemathesis make up requests from `/openapi.json`, right ones and wrong ones, and looks for errors of the server.

    pip install schemathesis
    python tests/interop/described_requests.py --cairn target/release/cairn [--model tests/goldens/gguf/chat.gguf]
"""

import argparse
import re
import subprocess
import sys
import tempfile
import threading
import urllib.request
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--cairn", required=True)
parser.add_argument("--model", default="tests/goldens/gguf/chat.gguf")
parser.add_argument("--examples", default="30")
args = parser.parse_args()

models = Path(args.model).resolve().parent
command = [args.cairn, "serve", args.model, "--port", "0", "--models-dir", models, "--log-level", "off"]
server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
try:
    for line in server.stderr:
        if found := re.search(r"http://\S+", line):
            address = found.group()
            break
    threading.Thread(target=lambda: [None for _ in server.stderr], daemon=True).start()
    schemathesis = Path(sys.executable).absolute().with_name("schemathesis")
    # Models that are forgotten stay so; all else is asked in any order.
    run = [schemathesis, "run", f"{address}/openapi.json", "--checks", "not_a_server_error",
           "--exclude-path", "/v1/models/unload", "--max-examples", args.examples, "--request-timeout", "30"]
    # It leaves a folder where it runs.
    with tempfile.TemporaryDirectory() as folder:
        status = subprocess.run(run, cwd=folder).returncode
    with urllib.request.urlopen(f"{address}/ready") as ready:
        assert ready.status == 200
    sys.exit(status)
finally:
    server.kill()
