"""Nodes that keep their model where no wire carries it, and give out a text or a mask.

Each has another hiding place. All load once, and then use what they have.
"""

import functools
import hashlib
import queue
import threading
import time
import weakref

import comfy.model_management
import torch
from torch import nn

from .notes import note


def digest(tensor):
    return hashlib.sha256(tensor.cpu().numpy().tobytes()).hexdigest()[:16]


def load(mib):
    """Four layers of `mib` MiB in all, straight on the GPU."""
    rows = mib * 2**20 // 1024 // 4 // 4
    net = nn.Sequential(*[nn.Linear(1024, rows, bias=False, device="cuda") for _ in range(4)])
    for index, layer in enumerate(net):
        layer.weight.data.fill_((index + 1) / 1024)
    return Summing(net)


class Summing(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    def forward(self, x):
        return sum(layer(x).sum() for layer in self.layers)


class Features:
    """No module: a plain object with tensors in a dict, as video and face packs keep them."""

    def __init__(self, mib):
        rows = mib * 2**20 // 1024 // 4 // 4
        self.cache = {
            f"frame {i}": torch.full((rows, 1024), (i + 1) / 1024, device="cuda") for i in range(4)
        }

    def __call__(self, x):
        return sum((frame @ x[0]).sum() for frame in self.cache.values())


class Hiding:
    """A captioner. `model()` gives the model from its hiding place, loaded if it is not there."""

    CATEGORY = "careless"
    FUNCTION = "run"
    RETURN_TYPES = ("STRING",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "mib": ("INT", {"default": 64, "max": 1 << 20}),
                "text": ("STRING", {"multiline": True}),
            },
            "optional": {
                "after": ("STRING", {"forceInput": True}),
                "slow": ("BOOLEAN", {"default": False}),
            },
        }

    def run(self, mib, text, after="", slow=False):
        run = self.model(mib)
        if slow:
            note(f"slow {type(self).__name__}")
            for _ in range(36000):
                comfy.model_management.throw_exception_if_processing_interrupted()
                time.sleep(0.1)
        return (digest(run(torch.full((1, 1024), float(len(text)), device="cuda"))),)


INSTANCES = weakref.WeakSet()


class HideOnInstance(Hiding):
    kept = None

    def model(self, mib):
        INSTANCES.add(self)
        if self.kept is None:
            self.kept = load(mib)
        return self.kept


MODEL = None


class HideInGlobal(Hiding):
    def model(self, mib):
        global MODEL
        if MODEL is None:
            MODEL = load(mib)
        return MODEL


class HideOnClass(Hiding):
    shared = None

    def model(self, mib):
        if HideOnClass.shared is None:
            HideOnClass.shared = load(mib)
        return HideOnClass.shared


@functools.lru_cache(maxsize=2)
def cached_load(mib):
    return load(mib)


class HideInLruCache(Hiding):
    def model(self, mib):
        return cached_load(mib)


CLOSURE = None


class HideInClosure(Hiding):
    """The global is a function; only its closure has the model."""

    def model(self, mib):
        global CLOSURE
        if CLOSURE is None:
            net = load(mib)

            def caption(x):
                return net(x)

            CLOSURE = caption
        return CLOSURE


def apply(net, x):
    return net(x)


PARTIALS = []


class HideInPartial(Hiding):
    def model(self, mib):
        if not PARTIALS:
            PARTIALS.append(functools.partial(apply, load(mib)))
        return PARTIALS[0]


SESSIONS = {}


class HideInSession(Hiding):
    """Sessions by name, each a dict with the model among its state."""

    def model(self, mib):
        session = SESSIONS.setdefault("default", {})
        if "net" not in session:
            session.update(net=load(mib), steps=3)
        return session["net"]


class Worker(threading.Thread):
    """Its model is an attribute of an object that only this thread's own frame holds."""

    def __init__(self, mib):
        super().__init__(name="careless worker", daemon=True)
        self.asked, self.answers = queue.Queue(), queue.Queue()
        self.start()
        self(mib)

    def run(self):
        engine = None
        with torch.inference_mode():
            while (value := self.asked.get()) is not None:
                try:
                    if engine is None:
                        engine = Engine(value)
                        self.answers.put(None)
                    else:
                        self.answers.put(engine.net(value))
                except Exception as error:
                    self.answers.put(error)
                del value

    def __call__(self, value):
        self.asked.put(value)
        answer = self.answers.get()
        if isinstance(answer, Exception):
            raise answer
        return answer


class Engine:
    def __init__(self, mib):
        self.net = load(mib)


WORKERS = []


class HideInThread(Hiding):
    def model(self, mib):
        if not WORKERS:
            WORKERS.append(Worker(mib))
        return WORKERS[0]


FEATURES = []


class HideInObject(Hiding):
    def model(self, mib):
        if not FEATURES:
            FEATURES.append(Features(mib))
        return FEATURES[0]


class HideAndMask(HideOnInstance):
    """Gives out a mask, as segmenters do; its numbers say what the model computed."""

    RETURN_TYPES = ("MASK",)

    def run(self, mib, text, after="", slow=False):
        (text,) = super().run(mib, text, after, slow)
        return (torch.tensor([[[int(digit, 16) / 16 for digit in text]]]),)


class ReadMask:
    CATEGORY = "careless"
    FUNCTION = "run"
    RETURN_TYPES = ("STRING",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"mask": ("MASK",)}}

    def run(self, mask):
        return ("".join(f"{int(value * 16):x}" for value in mask.flatten().tolist()),)


def forget():
    """Empties every hiding place."""
    global MODEL, CLOSURE
    MODEL = CLOSURE = HideOnClass.shared = None
    for instance in INSTANCES:
        instance.kept = None
    cached_load.cache_clear()
    SESSIONS.clear()
    for worker in WORKERS:
        worker.asked.put(None)
        worker.join()
    for kept in (PARTIALS, WORKERS, FEATURES):
        kept.clear()


NODES = (
    *(HideOnInstance, HideInGlobal, HideOnClass, HideInLruCache, HideInClosure, HideInPartial),
    *(HideInSession, HideInThread, HideInObject, HideAndMask, ReadMask),
)
