"""The page that `omni app` serves: choose or record, ask, and see where the model looked for each word.

visit.py    one visitor's items, questions and answers
markup.py   a visit as HTML
knows.py    sentences about the model, from its card
page.py     the routes: what a visitor may send, and the responses
door.py     which requests are allowed
server.py   the socket, and the server's process

In the browser, `page.js` sends requests and shows the responses, and `recorder.js` records from the microphone.
"""
