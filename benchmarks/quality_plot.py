"""A picture of speed against quality, as SVG: no library is needed for some points and two axes."""

from __future__ import annotations

from html import escape

WIDTH, HEIGHT, LEFT, TOP = 720, 440, 70, 30
INNER_WIDTH, INNER_HEIGHT = WIDTH - LEFT - 170, HEIGHT - TOP - 60


def plot(points: dict[str, tuple[float, float]]) -> str:
    """`points`: speed-up and SSIM of the worst picture, by setting."""
    most = max(2.0, *(speed for speed, _ in points.values())) * 1.05
    least = min(0.9, *(ssim for _, ssim in points.values())) - 0.01

    def place(speed: float, ssim: float) -> tuple[float, float]:
        return LEFT + INNER_WIDTH * speed / most, TOP + INNER_HEIGHT * (1 - ssim) / (1 - least)

    parts = [_line(LEFT, TOP, LEFT, TOP + INNER_HEIGHT), _line(LEFT, HEIGHT - 60, LEFT + INNER_WIDTH, HEIGHT - 60)]
    for speed in range(int(most) + 1):
        x, _ = place(speed, 1)
        parts.append(_text(x, HEIGHT - 42, f"{speed}x", anchor="middle"))
    for hundredth in range(int(least * 100) + 1, 101, 2 if least > 0.8 else 10):
        _, y = place(0, hundredth / 100)
        parts.append(_text(LEFT - 8, y + 4, f"{hundredth / 100:.2f}", anchor="end"))
        parts.append(_line(LEFT, y, LEFT + INNER_WIDTH, y, color="#ddd"))
    for name, (speed, ssim) in points.items():
        x, y = place(speed, ssim)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="#2563eb"/>')
        parts.append(_text(x + 8, y + 4, name))
    parts.append(_text(LEFT + INNER_WIDTH / 2, HEIGHT - 18, "speed-up of the whole request", anchor="middle"))
    parts.append(_text(LEFT - 50, TOP - 12, "SSIM of the worst picture"))
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12">\n<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def _line(x1: float, y1: float, x2: float, y2: float, color: str = "#333") -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}"/>'


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#333">{escape(text)}</text>'
