"""A server of your own: answers stream, and one that nobody waits for any more ends with the token at hand.

    pip install fastapi uvicorn
    uvicorn --app-dir examples fastapi_server:app
    curl -N "localhost:8000/answer?question=Describe%20the%20picture." --data-binary @scene.png

`dream-hf serve` is a whole one, with an API like OpenAI's.
"""

import io
import threading

import torch
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import StreamingResponse
from PIL import Image
from transformers import AsyncTextIteratorStreamer, StoppingCriteria, StoppingCriteriaList

from dream_hf.demo import load_pair

app = FastAPI()
target, drafter, processor = load_pair()  # or a pair of your own, as in your_own_vlm.py


class Cancelled(StoppingCriteria):
    """Ends an answer as soon as it is told to; it is asked about each token, also of those that came at once."""

    def __init__(self):
        self.event = threading.Event()

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


@app.post("/answer")
async def answer(request: Request, question: str, max_new_tokens: int = 256):
    try:
        picture = Image.open(io.BytesIO(await request.body())).convert("RGB")
    except OSError as error:
        raise HTTPException(400, "The body of the request must be a picture.") from error
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(target.device, target.dtype)
    streamer = AsyncTextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    cancelled = Cancelled()

    def generate():
        try:
            target.generate(
                **inputs,
                assistant_model=drafter,
                max_new_tokens=max_new_tokens,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([cancelled]),
            )
        except Exception:
            streamer.end()  # or the client waits for ever
            raise

    async def text():
        try:
            threading.Thread(target=generate, name="answer").start()
            async for piece in streamer:
                yield piece
        finally:  # the answer is over, or the client has hung up
            cancelled.event.set()

    return StreamingResponse(text(), media_type="text/plain")
