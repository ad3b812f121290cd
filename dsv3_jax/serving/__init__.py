"""An HTTP server with OpenAI's API around the engine, and its chat page.

engine_thread   the thread that steps the engine; requests come from other threads
settings        what the operator chooses
bodies          bodies of HTTP requests to requests of the engine, checked
answers         what the engine writes to answers in the API's form
generation      one HTTP request on its way: outputs as they come, time-out, clients that leave
metrics         counters and histograms in Prometheus' text format
app, server     the routes; the server process
page.html       the chat page, one file
"""
