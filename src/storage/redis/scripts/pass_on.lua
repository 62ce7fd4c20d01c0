-- What the scripts below share. It stands behind their first lines, which answer the usual case
-- without it.

-- The channel of whoever has `token`.
local function inbox(token)
  return string.match(KEYS[1], '^[^:]*') .. ':inbox:' .. string.sub(token, 1, 32)
end

-- Raises the fencing counter, KEYS[3], to the server's clock in microseconds and to `seen`.
local function raise(seen)
  local time = redis.call('TIME')
  local floor = math.max(time[1] * 1000000 + time[2], seen)
  if tonumber(redis.call('GET', KEYS[3]) or 0) < floor then
    redis.call('SET', KEYS[3], string.format('%.0f', floor))
  end
end

-- Takes `count` fencing tokens and answers the first of them; 0 if none are wanted. An error is
-- answered too, not raised.
local function fence(count)
  if count == 0 then return 0 end
  local last = redis.pcall('INCRBY', KEYS[3], count)
  if type(last) ~= 'number' then return last end
  -- Below any clock in microseconds: the counter was lost.
  if last < 2 ^ 50 then
    raise(0)
    last = redis.call('INCRBY', KEYS[3], count)
  end
  -- From here on numbers are not exact.
  if last >= 2 ^ 53 then return { err = 'ERR the fencing counter is above 2^53' } end
  return last - count + 1
end

-- Gives the free lock to the first in the queue whose inbox has a subscriber, and answers its ttl
-- and the server's time. Whoever has no subscriber is gone and is taken out, as is an entry that
-- makes no sense. If `asking` comes first, nobody is given the lock.
local function pass_on(asking)
  while true do
    local first = redis.call('LINDEX', KEYS[2], 0)
    if not first then return nil end
    local token, ttl, count = string.match(first, '^(%S+) (%d+) (%d+)$')
    if token and token == asking then return nil end
    redis.call('LPOP', KEYS[2])
    if token then
      local tokens = fence(tonumber(count))
      -- Whoever is given the lock without its tokens asks for them, and hears of the error.
      if type(tokens) ~= 'number' then tokens = 0 end
      redis.call('SET', KEYS[1], token, 'PX', ttl)
      local time = redis.call('TIME')
      local others = redis.call('EXISTS', KEYS[2])
      local grant = table.concat({ 'g', KEYS[1], token, ttl, time[1], time[2], others,
        string.format('%.0f', tokens), count }, ' ')
      local heard = redis.pcall('PUBLISH', inbox(token), grant)
      if type(heard) == 'number' and heard > 0 then return tonumber(ttl), time[1], time[2] end
      redis.call('DEL', KEYS[1])
    end
  end
end

-- Puts `token`, which wants the lock for `ttl` milliseconds and `count` fencing tokens with it, at
-- the end of the queue, if it does not stand there yet, and sees to it that the queue is kept for
-- `place` milliseconds.
local function stand(token, ttl, count, place)
  local stands = false
  for _, entry in ipairs(redis.call('LRANGE', KEYS[2], 0, -1)) do
    stands = stands or string.match(entry, '^%S+') == token
  end
  -- Before there is an entry: whoever may not do this is told so, and leaves no queue for good.
  if redis.call('PTTL', KEYS[2]) < tonumber(place) then
    redis.call('PEXPIRE', KEYS[2], place)
  end
  if not stands and redis.call('RPUSH', KEYS[2], token .. ' ' .. ttl .. ' ' .. count) == 1 then
    redis.call('PEXPIRE', KEYS[2], place)
  end
end

-- Takes `token` out of the queue.
local function leave(token)
  for _, entry in ipairs(redis.call('LRANGE', KEYS[2], 0, -1)) do
    if string.match(entry, '^%S+') == token then redis.call('LREM', KEYS[2], 1, entry) end
  end
end
