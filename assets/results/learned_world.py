"""The linear world of theory.py, learned: one autoencoder for samples of x and for unpaired samples of y.

    python assets/results/theory.py --seeds=1    # trains every arm below, about two minutes

Ten latents are shared. x shows one of them in full and nine at a twentieth, y shows all ten in full. Does y
help a network to find in x what is hardly visible there? The bottleneck has ten units, and x has five private
latents besides: there is no room for all fifteen.
"""
import torch
import torch.nn as nn

# Every arm but "longer" has 10,000 samples; that has only uml's 5,000 x, with its FLOPs. The linear ones show
# what ReLU does: it cuts most units off for half of the items, so that one direction takes two of them.
LEARNED = {
    "alone": dict(n_x=10000, n_y=0),
    "longer": dict(n_x=5000, n_y=0, steps=8000),
    "uml": dict(n_x=5000, n_y=5000),
    "control": dict(n_x=5000, n_y=5000, shuffle=True),
    "uml 1:9": dict(n_x=1000, n_y=9000),
    "control 1:9": dict(n_x=1000, n_y=9000, shuffle=True),
    "alone linear": dict(n_x=10000, n_y=0, relu=False),
    "uml linear": dict(n_x=5000, n_y=5000, relu=False),
    "control linear": dict(n_x=5000, n_y=5000, shuffle=True, relu=False),
}
SHARED, PRIVATE, OBSERVED, WIDTH, BATCH = 10, 5, 50, 128, 512


class SharedAutoencoder(nn.Module):
    """x and y have an embed and a head each; the encoder and the decoder between them are the same."""

    def __init__(self, relu):
        super().__init__()
        bend = nn.ReLU() if relu else nn.Identity()
        self.embed = nn.ModuleDict({side: nn.Linear(OBSERVED, WIDTH) for side in "xy"})
        self.encode = nn.Sequential(nn.Linear(WIDTH, SHARED), bend, nn.Linear(SHARED, SHARED))
        self.decode = nn.Sequential(nn.Linear(SHARED, SHARED), bend, nn.Linear(SHARED, WIDTH))
        self.head = nn.ModuleDict({side: nn.Linear(WIDTH, OBSERVED) for side in "xy"})

    def code(self, side, items):
        """What the bottleneck holds of items (n, 50): (n, 10)."""
        return self.encode(self.embed[side](items))

    def loss(self, side, items):
        rebuilt = self.head[side](self.decode(self.code(side, items)))
        return (rebuilt - items).square().mean()


def draw(mix, n, strengths):
    """n samples of one side -> (samples (n, 50), their shared latents (n, 10))."""
    shared, private = mix
    theta = torch.randn(n, SHARED)
    samples = (theta * strengths) @ shared
    samples = samples + torch.randn(n, PRIVATE) @ private
    return samples + 0.09 * torch.randn(n, OBSERVED), theta


def shared_r2(model, items, theta):
    """Mean R^2 of the shared latents, read linearly off the bottleneck: fitted on half of the items."""
    code = torch.cat([model.code("x", items), torch.ones(len(items), 1)], 1)  # (n, 11)
    half = len(items) // 2
    solution = torch.linalg.lstsq(code[:half], theta[:half]).solution
    wanted, found = theta[half:], code[half:] @ solution
    spread = (wanted - wanted.mean(0)).square().sum(0)  # (10,)
    return (1 - (found - wanted).square().sum(0) / spread).mean().item()


def learned_world(n_x, n_y, seed, steps=4000, shuffle=False, relu=True):
    """Train one arm -> a dict of what it learned about x, measured on samples it has not seen.

    shuffle: each number of y moves to another item, which keeps how often it occurs and nothing else.
    r2: of the shared latents, on x as trained; r2_clear: on x that shows all ten in full. error: the squared
    error with which such clear x is rebuilt, errors: the same every 500 steps. always_on: the share of the
    encoder's units that are on for more than 90% of x.
    """
    torch.manual_seed(seed)
    weak, full = torch.full((SHARED,), 0.05), torch.ones(SHARED)
    weak[0] = 1.0
    mix = {side: (torch.randn(SHARED, OBSERVED), torch.randn(PRIVATE, OBSERVED)) for side in "xy"}
    data = {"x": draw(mix["x"], n_x, weak)[0], "y": draw(mix["y"], n_y, full)[0]}  # (n, 50) each
    if shuffle:
        columns = [column[torch.randperm(n_y)] for column in data["y"].T]
        data["y"] = torch.stack(columns, 1)
    held, clear = draw(mix["x"], 5000, weak), draw(mix["x"], 5000, full)

    model = SharedAutoencoder(relu)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    errors = []
    for step in range(steps + 1):
        if step % 500 == 0:
            with torch.no_grad():
                errors.append(model.loss("x", clear[0]).item())
        optimizer.zero_grad()
        for side in "xy":
            if len(data[side]):
                rows = torch.randint(len(data[side]), (BATCH,))
                model.loss(side, data[side][rows]).backward()
        optimizer.step()

    with torch.no_grad():
        before_last = model.encode[:2](model.embed["x"](held[0]))  # (n, 10), behind the ReLU
        on = (before_last > 0).float().mean(0)  # (10,)
        return dict(r2=shared_r2(model, *held), r2_clear=shared_r2(model, *clear), error=errors[-1],
                    errors=errors, always_on=(on > 0.9).float().mean().item())
