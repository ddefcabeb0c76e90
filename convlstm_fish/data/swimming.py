"""How the simulated fish swim, meet and chase.

Fish swim in bursts and coasts (kicks of the tail, then a glide that slows down), keep away from walls
and from each other, and about every second one of them darts for no visible reason and startles another.
From time to time a fish seeks out its neighbour and creeps up to it. The rate of a chase between two fish is

    rate = RATE * sigmoid((REACH - d) / SLOPE) * (1 - exp(-(t - t_last) / RECOVERY)),

with d their distance, t_last the end of the tank's last chase: it rises as they come close and as time
passes, so a chase can be seen coming in the picture. Fish dart as hard as they chase and far more often, and the
tail of a stalking fish makes up for its missing kicks, so a chase can hardly be foreseen from the motion.

Lengths are in tank units (pixels of a 240x320 frame), times in seconds, angles in radians.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Habits:
    """Constants of the behaviour, set so that the motion matches the published recording.

    Speeds are in tank units per second.
    """

    # Burst and coast.
    kick_interval: float = 0.75  # mean time between kicks of one fish
    kick_shape: float = 3.0  # gamma shape of the interval: 1 is Poisson, more is regular
    kick_speed: float = 12.5  # median speed gained by a kick
    kick_spread: float = 0.45  # sigma of its logarithm
    gentle_thrust: float = 0.15  # how long a kick pushes
    drag: float = 1.2  # time constant of the glide
    drag_length: float = 120.0  # length over which fast fish lose speed: drag grows with its square
    activity_time: float = 16.0  # time constant of the school's slow changes of mood
    activity_spread: float = 0.54  # sigma of the logarithm of kick rate and speed
    # Darts: hard kicks without a cause.
    dart_rate: float = 0.85  # darts per second in a tank of six
    dart_shape: float = 4.0  # gamma shape of the time between darts
    dart_speed: float = 174.0  # median speed gained
    dart_spread: float = 0.25  # sigma of its logarithm
    dart_company: float = 1.0  # probability that a second fish is startled
    dart_delay: tuple[float, float] = (0.0, 0.5)  # how long after the first
    thrust: float = 0.1  # how long a hard kick pushes
    # Steering.
    turn_time: float = 0.22  # time constant of a turn
    hard_turn_time: float = 0.1  # the same in darts and chases
    wander: float = 0.55  # weight of a random direction against the present one
    wall_range: float = 9.0  # distance at which walls are avoided
    personal_space: float = 130.0  # distance at which others are avoided
    shove: float = 12.0  # weight of that at distance 0
    crowded: float = 0.4  # share of personal_space at which a fish does not wait for its next kick
    alarm: float = 0.6  # but for this long after the last one
    # Encounters and chases.
    pause: float = 1.2  # least time from the end of a chase to the next approach
    rest: float = 1.5  # mean time after that
    approach_speed: float = 70.0  # speed gained by a kick towards a fish that is sought
    stalk_range: float = 60.0  # distance from which on the approach is slow
    stalk_speed: float = 12.0  # how fast the distance shrinks then
    stalk_beat: float = 1.0  # amplitude of the tail that the stalking fish tends to
    wary: float = 1.0  # weight with which the other one turns away
    calm: float = 0.7  # and its kicks, relative to others
    chase_rate: float = 4.0  # RATE, per second
    reach: float = 22.0  # REACH
    slope: float = 2.0  # SLOPE
    recovery: float = 1.5  # RECOVERY
    give_up: float = 0.06  # rate at which an approach ends without a chase
    chase_length: tuple[float, float] = (0.5, 1.1)  # duration
    chase_speed: float = 100.0  # speed gained by a kick of the chaser
    # Tail beat.
    beat: float = 0.6  # amplitude at a dart
    beat_decay: float = 0.1  # time constant
    beat_frequency: float = 3.0  # per second, of a fish at ease
    hard_beat_frequency: float = 6.0  # added at a dart


FREE, SEEKING, SOUGHT, CHASING, FLEEING = range(5)
_GRID = 2.0**20


def _wrap(angle: Array) -> Array:
    """The same angle in [-pi, pi)."""
    return (angle + np.pi) % (2 * np.pi) - np.pi


class School:
    """A group of fish in a tank, stepped frame by frame.

    Args:
        n_fish: how many, at least one.
        walls: left, top, right, bottom in tank units.
        lengths: body length of every fish.
        fps: frames per second; steps are made of at most 1/30 s.
        rng: the only source of chance.
        habits: constants of the behaviour.

    Attributes:
        chases: (start frame, end frame (exclusive), chaser, chased) of every chase so far; the last one
            may still run, its end is then the next frame.
    """

    def __init__(
        self,
        n_fish: int,
        walls: tuple[float, float, float, float],
        lengths: Array,
        fps: float,
        rng: np.random.Generator,
        habits: Habits | None = None,
    ) -> None:
        self.habits = habits or Habits()
        self.walls, self.lengths, self.rng, self.n = walls, lengths, rng, n_fish
        self.substeps = max(int(np.ceil(30.0 / fps)), 1)
        self.dt = 1.0 / fps / self.substeps
        self.frame = 0
        self.time = 0.0
        self.last_chase = 0.0
        self.chases: list[tuple[int, int, int, int]] = []
        left, top, right, bottom = walls
        n = n_fish
        self.x = rng.uniform(left + 30, right - 30, n)
        self.y = rng.uniform(top + 30, bottom - 30, n)
        self.heading = rng.uniform(-np.pi, np.pi, n)
        self.goal = self.heading.copy()
        self.past_heading = self.heading.copy()
        self.speed = rng.uniform(20, 60, n)
        self.push = np.zeros(n)
        self.push_left = np.zeros(n)
        self.strength = np.zeros(n)
        self.turn_rate = np.full(n, 1 / self.habits.turn_time)
        self.beat = np.zeros(n)
        self.phase = rng.uniform(0, 2 * np.pi, n)
        self.until_kick = rng.uniform(0, self.habits.kick_interval, n)
        self.since_kick = np.zeros(n)
        self.mode = np.zeros(n, np.int64)
        self.partner = np.full(n, -1)
        self.chase_end = 0.0
        self.next_approach = rng.exponential(self.habits.rest)
        self.mood = 0.0
        self.until_dart = self._dart_interval()
        self.until_join = np.full(n, np.inf)

    def _dart_interval(self) -> float:
        """Time to the next dart; more fish dart more often."""
        shape = self.habits.dart_shape
        return self.rng.gamma(shape, 6.0 / (self.n * self.habits.dart_rate * shape))

    def swim(self, n_frames: int) -> Array:
        """The next frames' poses.

        Args:
            n_frames: how many.

        Returns:
            (n_frames, fish, 6): x, y, heading, bend, amplitude and phase of the tail beat.
        """
        poses = np.empty((n_frames, self.n, 6))
        for k in range(n_frames):
            bend = np.clip(_wrap(self.past_heading - self.heading), -1.5, 1.5)
            poses[k] = np.stack([self.x, self.y, self.heading, bend, self.beat, self.phase], axis=1)
            for _ in range(self.substeps):
                self._step()
            self.frame += 1
            if self.chase_end and self.time >= self.chase_end:
                self._end_chase()
            elif self.chase_end:
                start, _, chaser, chased = self.chases[-1]
                self.chases[-1] = (start, self.frame + 1, chaser, chased)
        return poses

    def _step(self) -> None:
        """What happens within ``dt``: encounters, moods, decisions to kick, movement."""
        habits, dt, n = self.habits, self.dt, self.n
        dx = self.x[None] - self.x[:, None]
        dy = self.y[None] - self.y[:, None]
        distance = np.sqrt(dx * dx + dy * dy)
        np.fill_diagonal(distance, np.inf)
        if n > 1:
            self._encounters(distance)
        # Mood: a slow random walk that is pulled back to 0, in units of its own spread.
        keep = 1 - dt / habits.activity_time
        self.mood = keep * self.mood + np.sqrt(1 - keep * keep) * self.rng.standard_normal()
        activity = np.exp(habits.activity_spread * self.mood)
        self.until_kick -= dt * activity
        self.since_kick += dt
        # A wall or a neighbour ahead: the next kick comes early.
        ahead = 0.35 * self.speed
        nose_x, nose_y = self.x + ahead * np.cos(self.heading), self.y + ahead * np.sin(self.heading)
        left, top, right, bottom = self.walls
        wall_near = (nose_x < left + 8) | (nose_x > right - 8) | (nose_y < top + 8) | (nose_y > bottom - 8)
        seen = distance.copy()
        paired = self.partner >= 0
        seen[np.flatnonzero(paired), self.partner[paired]] = np.inf
        crowded = seen.min(axis=1) < habits.crowded * habits.personal_space
        early = (wall_near & (self.since_kick > 0.25)) | (crowded & (self.since_kick > habits.alarm))
        stalking = self._stalk(dx, dy, distance)
        kicking = ((self.until_kick <= 0) | early) & ~stalking
        darting = np.zeros(n, bool)
        if not self.chase_end:
            self.until_dart -= dt
        self.until_join -= dt  # infinite but for a fish that has been startled
        idle = self.mode == FREE
        if self.until_dart <= 0:
            self.until_dart = self._dart_interval()
            order = self.rng.permutation(n)
            order = order[idle[order]]
            darting[order[:1]] = True
            delay, join = self.rng.random(2)
            if join < habits.dart_company:
                low, high = habits.dart_delay
                self.until_join[order[1:2]] = low + (high - low) * delay
        darting |= (self.until_join <= 0) & idle
        self.until_join[self.until_join <= 0] = np.inf
        if (kicking | darting).any():
            self._kick(kicking | darting, darting, activity, dx, dy, seen)
        self._move()

    def _kick(
        self,
        who: npt.NDArray[np.bool_],
        darting: npt.NDArray[np.bool_],
        activity: float,
        dx: Array,
        dy: Array,
        seen: Array,
    ) -> None:
        """New headings and a push for the fish in ``who``."""
        habits, n = self.habits, self.n
        noise = self.rng.standard_normal((4, n))
        left, top, right, bottom = self.walls
        reach = habits.wall_range
        wish_x = np.cos(self.heading) + habits.wander * noise[0]
        wish_y = np.sin(self.heading) + habits.wander * noise[1]
        wish_x += 3 * (np.exp((left - self.x) / reach) - np.exp((self.x - right) / reach))
        wish_y += 3 * (np.exp((top - self.y) / reach) - np.exp((self.y - bottom) / reach))
        # Away from everybody who is not the partner.
        shove = habits.shove * np.maximum(1 - seen / habits.personal_space, 0.0) ** 2
        finite = np.where(np.isfinite(seen), np.maximum(seen, 1.0), 1.0)
        wish_x -= (shove * dx / finite).sum(axis=1)
        wish_y -= (shove * dy / finite).sum(axis=1)
        speed = activity * habits.kick_speed * np.exp(habits.kick_spread * noise[2])
        dart = habits.dart_speed * np.exp(habits.dart_spread * noise[3])
        speed = np.where(darting, dart, speed)
        pace = np.where(self.mode >= CHASING, 0.3, 1.0)
        for i in np.flatnonzero(who & (self.mode != FREE)):
            j = self.partner[i]
            toward_x, toward_y = dx[i, j], dy[i, j]
            gap = max(np.sqrt(toward_x**2 + toward_y**2), 1e-6)
            toward_x, toward_y = toward_x / gap, toward_y / gap
            if self.mode[i] == SEEKING:
                wish_x[i] += 5 * toward_x
                wish_y[i] += 5 * toward_y
                speed[i] = habits.approach_speed * np.exp(0.15 * noise[3, i])
                pace[i] = 0.4
            elif self.mode[i] == SOUGHT:
                if gap < habits.stalk_range:
                    speed[i] *= habits.calm
                    wish_x[i] -= habits.wary * toward_x
                    wish_y[i] -= habits.wary * toward_y
            elif self.mode[i] == CHASING:
                wish_x[i], wish_y[i] = toward_x, toward_y
                # Close behind, the chaser does not overtake.
                speed[i] = habits.chase_speed * np.exp(0.15 * noise[3, i]) * np.clip(gap / 24, 0.5, 1.0)
            else:
                wish_x[i] -= 2.5 * toward_x
                wish_y[i] -= 2.5 * toward_y
                speed[i] = 1.1 * habits.chase_speed * np.exp(0.15 * noise[3, i])
        self.goal = np.where(who, np.arctan2(wish_y, wish_x), self.goal)
        gain = np.maximum(speed - 0.35 * self.speed, 0.3 * speed)
        hard = darting | (self.mode >= CHASING)
        thrust = np.where(hard, habits.thrust, habits.gentle_thrust)
        self.strength = np.where(
            who, np.minimum(gain / habits.dart_speed * habits.thrust / thrust, 1.2) * habits.beat, self.strength
        )
        self.turn_rate = np.where(who, 1 / np.where(hard, habits.hard_turn_time, habits.turn_time), self.turn_rate)
        self.push = np.where(who, gain / thrust, self.push)
        self.push_left = np.where(who, thrust, self.push_left)
        self.since_kick = np.where(who, 0.0, self.since_kick)
        self.phase = np.where(who & (self.beat < 0.02), np.where(noise[0] > 0, 0.0, np.pi), self.phase)
        interval = self.rng.gamma(habits.kick_shape, habits.kick_interval / habits.kick_shape, n) * pace
        self.until_kick = np.where(who, np.maximum(interval, 0.12), self.until_kick)

    def _stalk(self, dx: Array, dy: Array, distance: Array) -> npt.NDArray[np.bool_]:
        """Fish that have come near the one they seek creep on towards it without kicks."""
        habits, dt = self.habits, self.dt
        stalking = self.mode == SEEKING
        for i in np.flatnonzero(stalking):
            j = self.partner[i]
            gap = max(distance[i, j], 1e-6)
            if gap > habits.stalk_range:
                stalking[i] = False
                continue
            away = self.speed[j] * (np.cos(self.heading[j]) * dx[i, j] + np.sin(self.heading[j]) * dy[i, j]) / gap
            aim = np.clip(habits.stalk_speed + away, 5.0, 80.0)
            self.speed[i] += (aim - self.speed[i]) * dt / 0.2
            self.goal[i] = np.arctan2(dy[i, j], dx[i, j])
            self.beat[i] += max(habits.stalk_beat - self.beat[i], 0.0) * dt / 0.1
        return stalking

    def _move(self) -> None:
        """One step of dt: push, drag, turn, tail beat, walls."""
        habits, dt = self.habits, self.dt
        pushing = self.push_left > 0
        self.speed = self.speed * (1 - dt * (1 / habits.drag + self.speed / habits.drag_length)) + np.where(
            pushing, self.push * np.minimum(dt, self.push_left), 0.0
        )
        self.push_left = np.maximum(self.push_left - dt, 0.0)
        turn = _wrap(self.goal - self.heading)
        self.heading = self.heading + turn * (1 - np.exp(-dt * self.turn_rate))
        self.past_heading = self.past_heading + _wrap(self.heading - self.past_heading) * (1 - np.exp(-dt / 0.13))
        self.beat = np.where(
            pushing,
            np.maximum(self.beat, self.beat + (self.strength - self.beat) * (1 - np.exp(-dt / 0.03))),
            self.beat * np.exp(-dt / habits.beat_decay),
        )
        hurry = np.where(self.mode == SEEKING, 0.0, self.beat / habits.beat)
        frequency = habits.beat_frequency + habits.hard_beat_frequency * hurry
        self.phase = (self.phase + 2 * np.pi * dt * frequency) % (2 * np.pi)
        cosine, sine = np.cos(self.heading), np.sin(self.heading)
        self.x = self.x + dt * self.speed * cosine
        self.y = self.y + dt * self.speed * sine
        # The snout cannot pass a wall; the fish slides along it.
        left, top, right, bottom = self.walls
        snout = 0.35 * self.lengths
        margin_x, margin_y = np.maximum(snout * cosine, 4.0), np.maximum(snout * sine, 4.0)
        self.x = np.clip(self.x, left + np.maximum(-snout * cosine, 4.0), right - margin_x)
        self.y = np.clip(self.y, top + np.maximum(-snout * sine, 4.0), bottom - margin_y)
        self.time += dt
        # The last bits of a sine differ between processors: without this, so would the whole recording.
        state = np.stack([self.x, self.y, self.heading, self.past_heading, self.speed, self.beat, self.phase])
        self.x, self.y, self.heading, self.past_heading, self.speed, self.beat, self.phase = (
            np.rint(state * _GRID) / _GRID
        )

    def _encounters(self, distance: Array) -> None:
        """Who seeks whom, and whether a chase starts now."""
        habits, dt = self.habits, self.dt
        if self.chase_end:
            return
        draw = self.rng.random(3)
        rest = 1 - np.exp(-(self.time - self.last_chase) / habits.recovery)
        rates = habits.chase_rate / (1 + np.exp(np.clip((distance - habits.reach) / habits.slope, -50, 50))) * rest
        rates = np.triu(rates, 1).ravel()
        total = rates.sum()
        if draw[0] < total * dt:
            pair = int(np.searchsorted(np.cumsum(rates), draw[1] * total))
            first, second = divmod(min(pair, self.n**2 - 1), self.n)
            if self.mode[second] == SEEKING or (self.mode[first] != SEEKING and draw[2] < 0.5):
                first, second = second, first
            self._begin_chase(first, second)
        elif (self.mode == SEEKING).any():
            if draw[2] < habits.give_up * dt:
                self._part()
        elif self.time >= self.next_approach:
            seeker = int(draw[1] * self.n)
            target = int(np.argmin(distance[seeker]))
            self.mode[seeker], self.mode[target] = SEEKING, SOUGHT
            self.partner[seeker], self.partner[target] = target, seeker
            self.until_kick[seeker] = min(self.until_kick[seeker], 0.2)

    def _begin_chase(self, chaser: int, chased: int) -> None:
        """From this frame on ``chaser`` is after ``chased``; whoever else was paired is free."""
        self.mode[:] = FREE
        self.partner[:] = -1
        self.mode[chaser], self.mode[chased] = CHASING, FLEEING
        self.partner[chaser], self.partner[chased] = chased, chaser
        self.until_kick[[chaser, chased]] = 0.0
        low, high = self.habits.chase_length
        self.chase_end = self.time + self.rng.uniform(low, high)
        self.chases.append((self.frame, self.frame + 1, chaser, chased))

    def _end_chase(self) -> None:
        """The chase ended before this frame."""
        start, _, chaser, chased = self.chases[-1]
        self.chases[-1] = (start, self.frame, chaser, chased)
        self.last_chase, self.chase_end = self.time, 0.0
        self._part()

    def _part(self) -> None:
        """Both fish are free again; the next approach comes after a while."""
        self.mode[:] = FREE
        self.partner[:] = -1
        self.next_approach = self.time + self.habits.pause + self.rng.exponential(self.habits.rest)
