"""The same job in distilabel, for the benchmark notebook to call with the Python of distilabel's own environment.

    python -m venv distilabel-venv
    distilabel-venv/bin/pip install "distilabel[openai]==1.5.3" requests
    distilabel-venv/bin/python distilabel_job.py http://127.0.0.1:PORT/v1 1000 32

Without beautifulsoup4: with it, distilabel looks up references on the internet at the end of a run.
The last line of output is JSON: rows asked for, rows answered, `seconds` of the pipeline run, `total` seconds with imports and set-up.
"""
import time

began = time.perf_counter()

import argparse
import json
import logging
import os
import tempfile

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # before distilabel imports datasets
logging.getLogger("httpx2").setLevel(logging.CRITICAL)  # distilabel silences httpx, which openai has since left for httpx2: a line per request would slow it

from distilabel.models import OpenAILLM
from distilabel.pipeline import Pipeline
from distilabel.steps import LoadDataFromDicts
from distilabel.steps.tasks import TextGeneration


def job(base_url: str, rows: int, batch: int, max_tokens: int, cache: str) -> Pipeline:
    """Ask for one text a row. The requests of a batch go out together and the next batch waits for them all: the batch size is the concurrency."""
    data = [{"instruction": f"Question {i}: what is it that a river carries?"} for i in range(rows)]
    with Pipeline(name="job", cache_dir=cache) as pipeline:
        load = LoadDataFromDicts(data=data, batch_size=batch)
        llm = OpenAILLM(base_url=base_url, api_key="x", model="mock", generation_kwargs={"max_new_tokens": max_tokens})
        load >> TextGeneration(llm=llm, input_batch_size=batch)
    return pipeline


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base_url")
    parser.add_argument("rows", type=int)
    parser.add_argument("batch", type=int, nargs="?", default=32)
    parser.add_argument("--max-tokens", type=int, default=128)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        pipeline = job(args.base_url, args.rows, args.batch, args.max_tokens, cache)
        start = time.perf_counter()
        answers = pipeline.run(use_cache=False)["default"]["train"]["generation"]
        end = time.perf_counter()
    print(json.dumps({"rows": args.rows, "answered": sum(bool(a) for a in answers), "batch": args.batch,
                      "seconds": round(end - start, 3), "total": round(end - began, 3)}), flush=True)


if __name__ == "__main__":  # the pipeline starts processes of its own
    main()
