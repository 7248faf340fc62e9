"""The page that `omni app` serves: choose pictures, ask, and see where the model looked for each word of its answer.

`visit` is what one visitor has chosen and been told, `markup` how that looks, `page` the page with its events (gradio),
`server` where it is served.
"""
