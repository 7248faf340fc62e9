"""A server with OpenAI's interface for a fused model. It trusts no client.

requests.py    every field of a request, and its bounds
remote.py      downloads files, but only from addresses on the public internet
worker.py      the thread that answers one request after another
writing.py     an answer while it is written
replies.py     answers in the forms that clients expect
connections.py which clients are allowed
server.py      routes, and the order of these steps
vllm.py        registers omni's models with vLLM
vllm_model.py  vLLM's backend, with items of omni's modalities
"""
