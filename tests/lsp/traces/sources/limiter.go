// Package limiter bounds how often callers may do something: a token bucket for each key, forgotten when idle.
package limiter

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"sync"
	"time"
)

// ErrClosed is returned by every method after Close.
var ErrClosed = errors.New("limiter: closed")

// Clock tells the time; tests bring their own.
type Clock func() time.Time

// Config says how fast buckets fill and how much they hold.
type Config struct {
	PerSecond float64
	Burst     int
	IdleAfter time.Duration
	Clock     Clock
}

func (c Config) validate() error {
	switch {
	case c.PerSecond <= 0:
		return fmt.Errorf("limiter: PerSecond must be above 0, not %g", c.PerSecond)
	case c.Burst < 1:
		return fmt.Errorf("limiter: Burst must be at least 1, not %d", c.Burst)
	case c.IdleAfter < 0:
		return fmt.Errorf("limiter: IdleAfter must not be negative, but is %s", c.IdleAfter)
	}
	return nil
}

type bucket struct {
	tokens float64
	seen   time.Time
}

// Limiter is safe for use by several goroutines.
type Limiter struct {
	config Config

	mu      sync.Mutex
	buckets map[string]*bucket
	closed  bool
	stop    chan struct{}
}

// New starts a limiter; Close stops its janitor.
func New(config Config) (*Limiter, error) {
	if err := config.validate(); err != nil {
		return nil, err
	}
	if config.Clock == nil {
		config.Clock = time.Now
	}
	l := &Limiter{config: config, buckets: make(map[string]*bucket), stop: make(chan struct{})}
	if config.IdleAfter > 0 {
		go l.janitor()
	}
	return l, nil
}

// refill brings b up to date. The caller holds l.mu.
func (l *Limiter) refill(b *bucket, now time.Time) {
	elapsed := now.Sub(b.seen).Seconds()
	if elapsed <= 0 {
		return
	}
	b.tokens += elapsed * l.config.PerSecond
	if full := float64(l.config.Burst); b.tokens > full {
		b.tokens = full
	}
	b.seen = now
}

// Allow takes a token from the bucket of key, if it holds one.
func (l *Limiter) Allow(key string) (bool, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return false, ErrClosed
	}
	now := l.config.Clock()
	b, known := l.buckets[key]
	if !known {
		b = &bucket{tokens: float64(l.config.Burst), seen: now}
		l.buckets[key] = b
	}
	l.refill(b, now)
	if b.tokens < 1 {
		return false, nil
	}
	b.tokens--
	return true, nil
}

// Wait blocks until a token is there or the context ends.
func (l *Limiter) Wait(ctx context.Context, key string) error {
	for {
		ok, err := l.Allow(key)
		if err != nil || ok {
			return err
		}
		timer := time.NewTimer(time.Duration(float64(time.Second) / l.config.PerSecond))
		select {
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		case <-l.stop:
			timer.Stop()
			return ErrClosed
		case <-timer.C:
		}
	}
}

func (l *Limiter) janitor() {
	ticker := time.NewTicker(l.config.IdleAfter)
	defer ticker.Stop()
	for {
		select {
		case <-l.stop:
			return
		case <-ticker.C:
			l.forgetIdle()
		}
	}
}

func (l *Limiter) forgetIdle() {
	l.mu.Lock()
	defer l.mu.Unlock()
	before := l.config.Clock().Add(-l.config.IdleAfter)
	for key, b := range l.buckets {
		if b.seen.Before(before) {
			delete(l.buckets, key)
		}
	}
}

// Middleware answers 429 with a Retry-After header when the caller's address is over its limit.
func (l *Limiter) Middleware(next http.Handler) http.Handler {
	retry := strconv.Itoa(int(1/l.config.PerSecond) + 1)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ok, err := l.Allow(r.RemoteAddr)
		if err != nil || !ok {
			w.Header().Set("Retry-After", retry)
			http.Error(w, "too many requests", http.StatusTooManyRequests)
			return
		}
		next.ServeHTTP(w, r)
	})
}

