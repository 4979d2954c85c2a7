"""Programs that run models, each driven by a module that runs in a process of its own.

A module is started with ``python -m`` and answers one request (``engines.run``) with messages, in the order of its
work:

- ``library``: its name and version;
- ``loading``: ``problems``, what it says about the weights while it loads them (missing or unexpected ones);
- ``refused``: it does not load the model, with its reason; nothing follows;
- ``tokens``: ``ids`` of each text of the request, with what the engine puts around a text;
- ``template``: ``text``, the conversation of the request as the engine writes it; null if it has no template;
- ``stops``: ``ids`` that end its answers;
- ``logits``: float32 (positions, vocabulary), of the last positions of the request's ``ids``;
- ``continuation``: ``ids`` of the ``new_tokens`` tokens that it generates after the prompt, each the likeliest, from
  its cache; it does not stop at one that ends an answer;
- ``unable``: something of this that it cannot do here, with the reason.
"""
