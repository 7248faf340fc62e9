"""A server with OpenAI's interface for a fused model. It trusts no client.

requests.py    what a request may ask for: every field, and its bounds
remote.py      files from addresses on the public internet, and from no others
worker.py      one request after another through the model, until it is answered or its client is gone
writing.py     an answer while it is written
replies.py     what was written, in the forms that clients expect
connections.py who may speak to the server, and for how long it may keep silent
server.py      routes, and the order of it all
vllm.py        how vLLM finds omni's models
vllm_model.py  vLLM's backend, with items of omni's modalities
"""
