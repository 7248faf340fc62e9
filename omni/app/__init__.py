"""The page that `omni app` serves: choose pictures, ask, and see where the model looked for each word of its answer.

`visit` is what one visitor has chosen and been told, `markup` how that looks, `page` what a visitor may send and what comes
back, `door` who may send anything, `server` where it listens. In a browser `page.js` sends, and shows what comes back.
"""
