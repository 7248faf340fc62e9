"""The page that `omni app` serves: choose or record, ask, and see where the model looked for each word.

`visit` is what one visitor has chosen and been told, `markup` how that looks, `knows` what is said of the model, `page` what
a visitor may send and what comes back, `door` who may send anything, `server` where it listens. In a browser `page.js`
sends, and shows what comes back; `recorder.js` listens to the microphone.
"""
