"""Serving: `transformers serve` with a checkpoint of omni, for clients that nobody has reason to trust.

server.py     starts the server of transformers and holds requests to what a fused model can answer
requests.py   what a request may ask for, and its pictures
vllm.py       how vLLM finds omni's models
remote.py     pictures from addresses on the public internet, and from no others
"""
